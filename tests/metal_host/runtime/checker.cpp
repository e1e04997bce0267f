// The exact checker. Kernel text is compiled with -fsanitize=thread, but the calls the
// compiler inserts at every access land here instead of in ThreadSanitizer's runtime.
// Two accesses to a byte, one of them a write, are a race unless one thread made both
// or a barrier that covers the memory lies between: judged by counting barriers, so
// that detection does not depend on the order in which threads happened to run.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "executor.h"

namespace host {
namespace {

// When a thread touched a byte: thread + 1 (0: never), group, and the barriers passed.
struct Touch {
  uint32_t thread, group, epoch, simdgroup_epoch;
};

struct Cell {  // of one byte
  Touch write, read;
  bool many_readers, written;
};

struct Traffic {
  uint64_t read, written;
  std::vector<uint8_t> seen;  // bit 0 read, bit 1 written
};

struct Place {  // what an address belongs to
  const char* name;
  int buffer;  // -1: threadgroup memory
  size_t offset, size;
};

std::vector<Cell> arena_cells;
std::vector<std::vector<Cell>> output_cells;
std::vector<Traffic> traffic;
char *lowest, *highest;
size_t last_buffer;

bool ordered(const Touch& before, uint32_t epoch) {
  if (before.group != group_index) return false;
  if (before.thread == current->index + 1 || before.epoch != epoch) return true;
  return (before.thread - 1) / 32 == current->simdgroup &&
         before.simdgroup_epoch != current->simdgroup_epoch;
}

void race(const Place& place, bool write, const Touch& before, const char* what, void* pc) {
  report("race", "%s+%zu: %s by thread %u of group %u after a %s by thread %u of group %u, "
         "no barrier between [pc %p]", place.name, place.offset, write ? "write" : "read",
         current->index, group_index, what, before.thread - 1, before.group, pc);
}

void judge(Cell& c, const Place& place, bool write, uint32_t epoch, void* pc) {
  const Touch now = {current->index + 1, group_index, epoch, current->simdgroup_epoch};
  if (c.write.thread && !ordered(c.write, epoch)) race(place, write, c.write, "write", pc);
  if (write) {
    const bool same_epoch = c.read.epoch == epoch && c.read.group == group_index;
    if (c.read.thread && (!ordered(c.read, epoch) || (same_epoch && c.many_readers)))
      race(place, write, c.read, "read", pc);
    c.write = now;
    c.written = true;
    return;
  }
  if (!c.written)
    report("uninitialised-read", "%s+%zu by thread %u of group %u [pc %p]", place.name,
           place.offset, current->index, group_index, pc);
  const bool same_epoch = c.read.thread && c.read.group == group_index && c.read.epoch == epoch;
  c.many_readers = same_epoch && (c.many_readers || c.read.thread != now.thread);
  c.read = now;
}

void out_of_bounds(const Place& p, size_t n, bool write, void* pc) {
  report("out-of-bounds", "%s of %zu bytes at %s%+ld (size %zu) by thread %u of group %u "
         "[pc %p]", write ? "write" : "read", n, p.name, long(p.offset), p.size,
         current->index, group_index, pc);
}

void in_arena(char* p, size_t n, bool write, void* pc) {
  for (const Variable& v : variables) {
    if (!v.base || p < v.base || p >= v.base + v.size + 32) continue;
    Place place = {v.name, -1, size_t(p - v.base), v.size};
    if (place.offset + n > v.size) return out_of_bounds(place, n, write, pc);
    for (size_t i = 0; i < n; ++i, ++place.offset)
      judge(arena_cells[p - arena + i], place, write, current->threadgroup_epoch, pc);
    return;
  }
  out_of_bounds({"threadgroup memory outside every variable, arena", -1, size_t(p - arena), 0},
                n, write, pc);
}

void in_buffer(size_t index, char* p, size_t n, bool write, void* pc) {
  const Buffer& b = dispatch.buffers[index];
  char name[32];
  snprintf(name, sizeof name, "buffer %zu", index);
  Place place = {name, int(index), size_t(p - b.base), b.size};
  if (p < b.base || p + n > b.base + b.size) return out_of_bounds(place, n, write, pc);
  if (dispatch.flags & kCount) {
    Traffic& t = traffic[index];
    (write ? t.written : t.read) += n;
    for (size_t i = 0; i < n; ++i) t.seen[place.offset + i] |= write ? 2 : 1;
    return;
  }
  if (!b.output) {
    if (write) report("write-to-input", "%s+%zu [pc %p]", name, place.offset, pc);
    return;
  }
  for (size_t i = 0; i < n; ++i, ++place.offset)
    judge(output_cells[index][place.offset], place, write, current->device_epoch, pc);
}

}  // namespace

void access(void* address, size_t n, bool write, void* pc) {
  if (!current) return;
  char* p = static_cast<char*>(address);
  if (p >= arena && p < arena + kArena) {
    if (!(dispatch.flags & kCount)) in_arena(p, n, write, pc);
    return;
  }
  if (p < lowest || p >= highest) return;  // a thread's own variable
  for (size_t tried = 0; tried < dispatch.buffers.size(); ++tried) {
    const size_t index = (last_buffer + tried) % dispatch.buffers.size();
    const Buffer& b = dispatch.buffers[index];
    if (p < b.region || p >= b.region + b.region_size) continue;
    last_buffer = index;
    return in_buffer(index, p, n, write, pc);
  }
}

void check_alignment(void* address, size_t n, void* pc) {
  if (current && reinterpret_cast<uintptr_t>(address) % n)
    report("misaligned", "access of %zu bytes at %p [pc %p]", n, address, pc);
}

void checker_start() {
  arena_cells.assign(kArena + 4096, Cell());
  lowest = reinterpret_cast<char*>(~uintptr_t(0));
  for (const Buffer& b : dispatch.buffers) {
    lowest = std::min(lowest, b.region);
    highest = std::max(highest, b.region + b.region_size);
    const bool counts = dispatch.flags & kCount;
    output_cells.emplace_back(b.output && !counts ? b.size : 0);
    traffic.push_back({0, 0, std::vector<uint8_t>(counts ? b.size : 0)});
  }
}

void checker_new_variable(const Variable& v) {
  std::fill_n(arena_cells.begin() + (v.base - arena), v.size, Cell());
}

void checker_finish(bool whole_grid) {
  if (!whole_grid || dispatch.flags & kCount) return;
  for (size_t b = 0; b < output_cells.size(); ++b) {
    const auto& cells = output_cells[b];
    const auto is_unwritten = [](const Cell& c) { return !c.written; };
    const auto first = std::find_if(cells.begin(), cells.end(), is_unwritten);
    if (first == cells.end()) continue;
    const long count = std::count_if(first, cells.end(), is_unwritten);
    report("unwritten-output", "%ld of %zu bytes of buffer %zu never written, first at %ld",
           count, cells.size(), b, long(first - cells.begin()));
  }
}

void write_traffic(FILE* file) {
  for (size_t b = 0; b < traffic.size(); ++b) {
    const Traffic& t = traffic[b];
    size_t read_once = 0, written_once = 0;
    for (const uint8_t s : t.seen) {
      read_once += s & 1;
      written_once += s >> 1;
    }
    fprintf(file, "traffic\t%zu\t%lu\t%zu\t%lu\t%zu\n", b, t.read, read_once, t.written,
            written_once);
  }
}

}  // namespace host

#define PC __builtin_return_address(0)
#define READ(n) host::access(a, n, false, PC);
#define WRITE(n) host::access(a, n, true, PC);
#define ALIGNED(n) host::check_alignment(a, n, PC);
#define HOOKS(n)                                            \
  void __tsan_read##n(void* a) { ALIGNED(n) READ(n) }       \
  void __tsan_write##n(void* a) { ALIGNED(n) WRITE(n) }     \
  void __tsan_unaligned_read##n(void* a) { READ(n) }        \
  void __tsan_unaligned_write##n(void* a) { WRITE(n) }      \
  void __tsan_read_write##n(void* a) { ALIGNED(n) READ(n) WRITE(n) } \
  void __tsan_unaligned_read_write##n(void* a) { READ(n) WRITE(n) }
extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* a, size_t n) { READ(n) }
void __tsan_write_range(void* a, size_t n) { WRITE(n) }
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  host::access(const_cast<void*>(from), n, false, PC);
  host::access(to, n, true, PC);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  host::access(const_cast<void*>(from), n, false, PC);
  host::access(to, n, true, PC);
  return memmove(to, from, n);
}
void* __tsan_memset(void* a, int value, size_t n) {
  WRITE(n)
  return memset(a, value, n);
}
}
