// Metal's vocabulary in CUDA, for mx.fast.cuda_kernel: a warp is a simdgroup of 32. The
// address-space words are respelt in the text itself (mlx_dora/kernels/_source.py), since
// macros of their names would break CUDA's own headers.

#ifndef MLX_DORA_CUDA_PRELUDE_H
#define MLX_DORA_CUDA_PRELUDE_H

typedef unsigned int uint;
typedef unsigned short ushort;

// Accesses of up to 16 bytes, see wide.h.
#define DORA_WIDE 1

#define METAL_FUNC static __device__ __forceinline__

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

METAL_FUNC void threadgroup_barrier(mem_flags) {
  __syncthreads();
}

// In every lane the sum over the warp, in a fixed order.
METAL_FUNC float simd_sum(float v) {
  for (int mask = 16; mask > 0; mask >>= 1) {
    v += __shfl_xor_sync(0xffffffffu, v, mask);
  }
  return v;
}

METAL_FUNC uint simd_shuffle(uint v, ushort lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}

METAL_FUNC float simd_shuffle_xor(float v, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}

namespace metal {
METAL_FUNC uint min(uint a, uint b) {
  return a < b ? a : b;
}

METAL_FUNC float fma(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
METAL_FUNC float max(float a, float b) {
  return fmaxf(a, b);
}
namespace precise {
METAL_FUNC float sqrt(float x) {
  return __fsqrt_rn(x);
}
}  // namespace precise
}  // namespace metal

METAL_FUNC uint3 dora_uint3(dim3 d) {
  return make_uint3(d.x, d.y, d.z);
}

#define thread_position_in_grid                        \
  (make_uint3(blockIdx.x * blockDim.x + threadIdx.x,   \
              blockIdx.y * blockDim.y + threadIdx.y,   \
              blockIdx.z * blockDim.z + threadIdx.z))
#define thread_position_in_threadgroup \
  (make_uint3(threadIdx.x, threadIdx.y, threadIdx.z))
#define threadgroup_position_in_grid (make_uint3(blockIdx.x, blockIdx.y, blockIdx.z))
#define threads_per_threadgroup (dora_uint3(blockDim))
#define threadgroups_per_grid (dora_uint3(gridDim))
// Every threadgroup is a row of threads: y and z are 1.
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
#define simdgroups_per_threadgroup (blockDim.x >> 5)

#endif  // MLX_DORA_CUDA_PRELUDE_H
