// One dispatch: its buffers, its grid, and what was found wrong with it.
#pragma once
#include <string>
#include <vector>

#include "interface.h"

namespace host {

// Bits of Dispatch::flags.
enum Flags : uint32_t {
  kMisalign = 1,  // buffers start one element off their natural alignment
  kHeap = 2,      // exact heap blocks, for AddressSanitizer's red zones
  kZeroPages = 4, // untouched pages read as zero: huge buffers cost nothing
  kFlushDenormals = 8,
  kCount = 16,    // count traffic instead of judging accesses
};

struct Buffer {
  char* base;
  size_t size;
  bool output;
  char* region;  // the mapping around it
  size_t region_size;
};

struct Dispatch {
  const Kernel* kernel;
  Triple grid, threadgroup;
  uint32_t first_group, last_group;  // half open, linear
  uint32_t seed, flags;
  std::vector<Buffer> buffers;
};

extern Dispatch dispatch;
extern size_t threadgroup_bytes_peak;

// Record a finding; the first text of each kind is kept.
void report(const char* kind, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

void run_groups();  // the executor
void write_traffic(FILE* file);

}  // namespace host
