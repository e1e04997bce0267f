// Runs a dispatch on one OS thread: every GPU thread is a fibre, and simdgroups of 32
// advance together from one simd function or barrier to the next. The order in which
// simdgroups and lanes run depends on the seed: 0 forward, 1 backward, else shuffled.
#include "executor.h"
#include "switch.h"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace host {

char* arena;
Fibre* current;
uint32_t group_index;
std::vector<Variable> variables;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr uint32_t kLanes = 32, kMaxThreads = 1024;
constexpr size_t kMaxThreadgroupBytes = 32768;

std::vector<Fibre> fibres;
uint32_t thread_count, simdgroup_count;
Triple group_position, group_size;
std::vector<void*> buffer_pointers;
size_t arena_top;
std::vector<void*> heap_variables;

struct Simdgroup {
  alignas(16) char values[kLanes * 16];
  uint32_t mask;
} simdgroups[kMaxThreads / kLanes];

// ---- switching ------------------------------------------------------------------
#if defined(__x86_64__)
void* scheduler_stack_pointer;
#else
ucontext_t scheduler_context, contexts[kMaxThreads];
#endif

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_bottom;
size_t scheduler_size;
void* scheduler_fake;
#endif

void to_scheduler(bool dying) {
  Fibre* f = current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(dying ? nullptr : &f->fake_stack, scheduler_bottom,
                                 scheduler_size);
#endif
  (void)dying;
#if defined(__x86_64__)
  host_switch(&f->stack_pointer, scheduler_stack_pointer);
#else
  swapcontext(&contexts[f->index], &scheduler_context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f->fake_stack, &scheduler_bottom, &scheduler_size);
#endif
}

void fibre_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  dispatch.kernel->function(buffer_pointers.data(), current->attributes);
  current->state = State::kDone;
  to_scheduler(true);
  abort();
}

void resume(Fibre* f) {
  current = f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake, f->stack, kStack);
#endif
#if defined(__x86_64__)
  host_switch(&scheduler_stack_pointer, f->stack_pointer);
#else
  swapcontext(&scheduler_context, &contexts[f->index]);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
  current = nullptr;
}

void prepare_stack(Fibre* f) {
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f->stack + kStack);
  *--top = nullptr;  // keeps the stack 16-byte aligned after the call
  *--top = reinterpret_cast<void*>(fibre_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f->stack_pointer = top;
#else
  ucontext_t& c = contexts[f->index];
  getcontext(&c);
  c.uc_stack.ss_sp = f->stack;
  c.uc_stack.ss_size = kStack;
  c.uc_link = nullptr;
  makecontext(&c, fibre_main, 0);
#endif
}

// ---- one threadgroup ------------------------------------------------------------
Triple divide_up(Triple a, Triple b) {
  return {(a.x + b.x - 1) / b.x, (a.y + b.y - 1) / b.y, (a.z + b.z - 1) / b.z};
}

Attributes attributes_of(uint32_t i) {
  const Triple& full = dispatch.threadgroup;
  const uint32_t dispatched = full.x * full.y * full.z;
  const Triple t = {i % group_size.x, i / group_size.x % group_size.y,
                    i / (group_size.x * group_size.y)};
  Attributes a;
  a.thread_position_in_threadgroup = t;
  a.thread_position_in_grid = {group_position.x * full.x + t.x,
                               group_position.y * full.y + t.y,
                               group_position.z * full.z + t.z};
  a.threadgroup_position_in_grid = group_position;
  a.threads_per_threadgroup = group_size;
  a.dispatch_threads_per_threadgroup = full;
  a.threads_per_grid = a.grid_size = dispatch.grid;
  a.grid_origin = {0, 0, 0};
  a.threadgroups_per_grid = divide_up(dispatch.grid, full);
  a.thread_index_in_threadgroup = i;
  a.thread_index_in_simdgroup = i % kLanes;
  a.simdgroup_index_in_threadgroup = i / kLanes;
  a.simdgroups_per_threadgroup = simdgroup_count;
  a.dispatch_simdgroups_per_threadgroup = (dispatched + kLanes - 1) / kLanes;
  a.threads_per_simdgroup = a.thread_execution_width = kLanes;
  a.thread_index_in_quadgroup = i % 4;
  a.quadgroup_index_in_threadgroup = i / 4;
  a.quadgroups_per_threadgroup = (thread_count + 3) / 4;
  a.dispatch_quadgroups_per_threadgroup = (dispatched + 3) / 4;
  return a;
}

void start_fibre(uint32_t i) {
  Fibre& f = fibres[i];
  f.state = State::kReady;
  f.index = i;
  f.simdgroup = i / kLanes;
  f.lane = i % kLanes;
  f.attributes = attributes_of(i);
  f.threadgroup_epoch = f.device_epoch = f.simdgroup_epoch = 1;
  f.fake_stack = nullptr;
  prepare_stack(&f);
}

bool waits_in_simd(const Fibre& f) {
  return f.state == State::kInSimd || f.state == State::kAtSimdBarrier;
}

void release_simd(uint32_t begin, uint32_t end) {
  Simdgroup& s = simdgroups[begin / kLanes];
  s.mask = 0;
  for (uint32_t i = begin; i < end; ++i) {
    Fibre& f = fibres[i];
    if (f.state == State::kInSimd) {
      memcpy(s.values + f.lane * f.in_size, f.in, f.in_size);
      s.mask |= 1u << f.lane;
    }
    if (f.state == State::kAtSimdBarrier) ++f.simdgroup_epoch;
    if (waits_in_simd(f)) f.state = State::kReady;
  }
}

// Let a simdgroup go on if all its live lanes wait in a simd function.
bool try_simd(uint32_t simdgroup) {
  const uint32_t begin = simdgroup * kLanes;
  const uint32_t end = std::min(thread_count, begin + kLanes);
  uint32_t live = 0, waiting = 0;
  const Fibre* first = nullptr;
  bool mixed = false;
  for (uint32_t i = begin; i < end; ++i) {
    const Fibre& f = fibres[i];
    if (f.state == State::kDone) continue;
    ++live;
    if (!waits_in_simd(f)) continue;
    ++waiting;
    if (!first) first = &f;
    mixed |= f.state != first->state || f.op != first->op;
  }
  if (!waiting || waiting != live) return false;
  if (mixed)
    report("simd-divergence", "lanes of simdgroup %u meet in different simd functions",
           simdgroup);
  if (live != end - begin)
    report("simd-partial", "simd function with %u of %u lanes left", live, end - begin);
  release_simd(begin, end);
  return true;
}

// Run each simdgroup as far as it gets without a threadgroup barrier.
bool run_simdgroups(std::vector<uint32_t>& order, std::vector<uint32_t>& lanes,
                    std::mt19937& random) {
  const bool shuffled = dispatch.seed > 1;
  if (shuffled) {
    std::shuffle(order.begin(), order.end(), random);
    std::shuffle(lanes.begin(), lanes.end(), random);
  }
  bool progress = false;
  for (const uint32_t s : order) {
    do {
      for (const uint32_t l : lanes) {
        const uint32_t i = s * kLanes + l;
        if (i >= thread_count || fibres[i].state != State::kReady) continue;
        resume(&fibres[i]);
        progress = true;
      }
    } while (try_simd(s) && (progress = true) && !shuffled);
  }
  return progress;
}

// All live threads wait at a threadgroup barrier: judge and release them.
void release_barrier(uint32_t done) {
  const Fibre* first = nullptr;
  bool mixed = false;
  unsigned flags = kDevice | kThreadgroup;
  for (uint32_t i = 0; i < thread_count; ++i) {
    const Fibre& f = fibres[i];
    if (f.state != State::kAtBarrier) continue;
    flags &= f.flags;
    if (!first) first = &f;
    mixed |= first->line != f.line || first->file != f.file;
  }
  if (done)
    report("barrier-partial", "%u of %u threads returned before the barrier at line %d",
           done, thread_count, first->line);
  if (mixed)
    report("barrier-divergence", "threads wait at different barriers (line %d, others)",
           first->line);
  for (uint32_t i = 0; i < thread_count; ++i) {
    Fibre& f = fibres[i];
    if (f.state != State::kAtBarrier) continue;
    f.state = State::kReady;
    if (flags & kThreadgroup) ++f.threadgroup_epoch;
    if (flags & kDevice) ++f.device_epoch;
  }
}

void forget_variables() {
  variables.clear();
  arena_top = 0;
#if defined(__SANITIZE_ADDRESS__)
  for (void* p : heap_variables) free(p);
#endif
  heap_variables.clear();
}

void run_group() {
  std::vector<uint32_t> order(simdgroup_count), lanes(kLanes);
  for (uint32_t i = 0; i < simdgroup_count; ++i) order[i] = i;
  for (uint32_t i = 0; i < kLanes; ++i) lanes[i] = i;
  if (dispatch.seed == 1) {
    std::reverse(order.begin(), order.end());
    std::reverse(lanes.begin(), lanes.end());
  }
  std::mt19937 random(dispatch.seed + group_index);
  forget_variables();
  for (uint32_t i = 0; i < thread_count; ++i) start_fibre(i);
  for (;;) {
    const bool progress = run_simdgroups(order, lanes, random);
    uint32_t done = 0, ready = 0, at_barrier = 0;
    for (uint32_t i = 0; i < thread_count; ++i) {
      done += fibres[i].state == State::kDone;
      ready += fibres[i].state == State::kReady;
      at_barrier += fibres[i].state == State::kAtBarrier;
    }
    if (done == thread_count) return;
    if (ready) continue;
    if (at_barrier && at_barrier + done == thread_count) {
      release_barrier(done);
    } else if (!progress) {
      report("deadlock",
             "group %u: %u threads at a barrier, %u returned, %u in simd functions",
             group_index, at_barrier, done, thread_count - at_barrier - done);
      return;
    }
  }
}

}  // namespace

// ---- what kernels call ------------------------------------------------------------
uint32_t lane() { return current->lane; }

void threadgroup_barrier(unsigned flags, const char* file, int line) {
  current->state = State::kAtBarrier;
  current->file = file;
  current->line = line;
  current->flags = flags;
  to_scheduler(false);
}

void simdgroup_barrier(unsigned flags, const char* file, int line) {
  current->state = State::kAtSimdBarrier;
  current->file = file;
  current->line = line;
  current->flags = flags;
  current->op = -1;
  to_scheduler(false);
}

uint32_t exchange(const void* in, size_t n, void* out, int op) {
  Fibre* f = current;
  f->state = State::kInSimd;
  f->op = op;
  f->in = in;
  f->in_size = n;
  to_scheduler(false);
  memcpy(out, simdgroups[f->simdgroup].values, kLanes * n);
  return simdgroups[f->simdgroup].mask;
}

void* threadgroup_memory(int slot, size_t bytes, size_t alignment, const char* name) {
  if (variables.size() <= size_t(slot)) variables.resize(slot + 1);
  Variable& v = variables[slot];
  if (v.base) return v.base;
#if defined(__SANITIZE_ADDRESS__)
  v = {static_cast<char*>(malloc(bytes)), bytes, name};  // red zones around it
  heap_variables.push_back(v.base);
#else
  constexpr size_t kGap = 64;
  arena_top = (arena_top + kGap + alignment - 1) / alignment * alignment;
  if (arena_top + bytes > kArena) {
    report("threadgroup-memory", "more than %zu bytes of threadgroup memory", kArena);
    v = {static_cast<char*>(malloc(bytes)), bytes, name};
    return v.base;
  }
  v = {arena + arena_top, bytes, name};
  arena_top += bytes;
#endif
  memset(v.base, 0xff, bytes);  // NaN
  checker_new_variable(v);
  size_t total = 0;
  for (const Variable& each : variables) total += each.size;
  threadgroup_bytes_peak = std::max(threadgroup_bytes_peak, total);
  if (total > kMaxThreadgroupBytes)
    report("threadgroup-memory", "%zu bytes of threadgroup memory, over %zu", total,
           kMaxThreadgroupBytes);
  return v.base;
}

void run_groups() {
  const Triple full = dispatch.threadgroup;
  const uint32_t threads = full.x * full.y * full.z;
  if (threads > kMaxThreads) {
    report("threadgroup-size", "%u threads, over %u", threads, kMaxThreads);
    return;
  }
  const int kProtection = PROT_READ | PROT_WRITE;
  const int kMapping = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  arena = static_cast<char*>(mmap(nullptr, kArena + 4096, kProtection, kMapping, -1, 0));
  fibres.resize(threads);
  for (Fibre& f : fibres)
    f.stack = static_cast<char*>(mmap(nullptr, kStack, kProtection, kMapping, -1, 0));
  for (const Buffer& b : dispatch.buffers) buffer_pointers.push_back(b.base);
  checker_start();
  const Triple groups = divide_up(dispatch.grid, full);
  const uint32_t total = groups.x * groups.y * groups.z;
  const uint32_t end = std::min(total, dispatch.last_group);
  for (group_index = dispatch.first_group; group_index < end; ++group_index) {
    group_position = {group_index % groups.x, group_index / groups.x % groups.y,
                      group_index / (groups.x * groups.y)};
    group_size = {std::min(full.x, dispatch.grid.x - group_position.x * full.x),
                  std::min(full.y, dispatch.grid.y - group_position.y * full.y),
                  std::min(full.z, dispatch.grid.z - group_position.z * full.z)};
    thread_count = group_size.x * group_size.y * group_size.z;
    simdgroup_count = (thread_count + kLanes - 1) / kLanes;
    run_group();
  }
  checker_finish(dispatch.first_group == 0 && end == total);
}

}  // namespace host
