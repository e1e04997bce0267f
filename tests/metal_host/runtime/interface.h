// What kernel text, compiled against the shim, asks of the executor.
#pragma once
#include <cstddef>
#include <cstdint>

namespace host {

struct Triple {
  uint32_t x, y, z;
};

// Every attribute that MLX can pass to a kernel, by its Metal name.
struct Attributes {
  Triple thread_position_in_grid, thread_position_in_threadgroup,
      threadgroup_position_in_grid, threads_per_threadgroup, threads_per_grid,
      threadgroups_per_grid, dispatch_threads_per_threadgroup, grid_size, grid_origin;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup,
      simdgroup_index_in_threadgroup, simdgroups_per_threadgroup,
      dispatch_simdgroups_per_threadgroup, threads_per_simdgroup,
      thread_execution_width, thread_index_in_quadgroup, quadgroup_index_in_threadgroup,
      quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
};

enum MemoryFlags : unsigned { kDevice = 1, kThreadgroup = 2 };

void threadgroup_barrier(unsigned flags, const char* file, int line);
void simdgroup_barrier(unsigned flags, const char* file, int line);

// Publish n (at most 16) bytes, wait for every live lane of the simdgroup, copy all
// 32 lanes' bytes to `out`. Returns the mask of the lanes that took part. `op` tells
// simd functions apart, so that lanes meeting in different ones are noticed.
uint32_t exchange(const void* in, size_t n, void* out, int op);
uint32_t lane();

// Storage of threadgroup variable number `slot` of the kernel.
void* threadgroup_memory(int slot, size_t bytes, size_t alignment, const char* name);

typedef void (*KernelFunction)(void** buffers, const Attributes& attributes);
struct Kernel {
  const char* name;
  KernelFunction function;
};
extern const Kernel kernels[];  // emitted beside the kernel text
extern const int kernel_count;

}  // namespace host
