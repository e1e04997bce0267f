// What the executor shows to the checker.
#pragma once
#include "dispatch.h"

namespace host {

enum class State { kReady, kInSimd, kAtSimdBarrier, kAtBarrier, kDone };

// One GPU thread.
struct Fibre {
  void* stack_pointer;
  char* stack;
  void* fake_stack;  // AddressSanitizer's
  State state;
  Attributes attributes;
  uint32_t index, simdgroup, lane;
  // Where it waits.
  const char* file;
  int line;
  unsigned flags;
  int op;
  const void* in;
  size_t in_size;
  // How many barriers it has passed, by the memory they order.
  uint32_t threadgroup_epoch, device_epoch, simdgroup_epoch;
};

struct Variable {  // in threadgroup memory
  char* base;
  size_t size;
  const char* name;
};

constexpr size_t kArena = 64 << 10;
extern char* arena;
extern Fibre* current;      // null outside the kernel
extern uint32_t group_index;
extern std::vector<Variable> variables;

// The exact checker (checker.cpp), or nothing where it is not linked.
void checker_start();
void checker_new_variable(const Variable& variable);
void checker_finish(bool whole_grid);

}  // namespace host
