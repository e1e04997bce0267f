// Barriers and simd functions: each is a call into the executor.
#pragma once
#include <cstring>

#include "../runtime/interface.h"
#include "half.h"

namespace metal {

enum class mem_flags : unsigned {
  mem_none = 0,
  mem_device = host::kDevice,
  mem_threadgroup = host::kThreadgroup
};
HOST_INLINE mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(unsigned(a) | unsigned(b));
}
HOST_INLINE void threadgroup_barrier(mem_flags flags, const char* file = __builtin_FILE(),
                                     int line = __builtin_LINE()) {
  host::threadgroup_barrier(unsigned(flags), file, line);
}
HOST_INLINE void simdgroup_barrier(mem_flags flags, const char* file = __builtin_FILE(),
                                   int line = __builtin_LINE()) {
  host::simdgroup_barrier(unsigned(flags), file, line);
}

// What all lanes of the simdgroup handed in.
template <class T>
struct Exchanged {
  T value[32];
  uint32_t mask;
  uint32_t me;
  HOST_INLINE Exchanged(T v, int op) {
    static_assert(sizeof(T) <= 16, "too large for a simd function");
    mask = host::exchange(&v, sizeof v, value, op);
    me = host::lane();
  }
  HOST_INLINE bool has(uint32_t lane) const { return lane < 32 && (mask >> lane & 1); }
  HOST_INLINE T at(uint32_t lane) const {
    if (has(lane)) return value[lane];
    T undefined;  // an absent lane gives an undefined value: NaN shows it
    std::memset(&undefined, 0xff, sizeof undefined);
    return undefined;
  }
};

#define HOST_REDUCTION(name, op, neutral, expression)                     \
  template <class T>                                                      \
  HOST_INLINE T name(T v) {                                               \
    const Exchanged<T> all(v, op);                                        \
    T t[32];                                                              \
    for (uint32_t i = 0; i < 32; ++i) t[i] = all.has(i) ? all.value[i] : neutral; \
    for (uint32_t half_width = 16; half_width; half_width >>= 1)          \
      for (uint32_t i = 0; i < half_width; ++i) {                         \
        const T a = t[i], b = t[i + half_width];                          \
        t[i] = T(expression);                                             \
      }                                                                   \
    return t[0];                                                          \
  }
HOST_REDUCTION(simd_sum, 1, T(0), a + b)
HOST_REDUCTION(simd_product, 2, T(1), a * b)
HOST_REDUCTION(simd_max, 3, v, a < b ? b : a)
HOST_REDUCTION(simd_min, 4, v, b < a ? b : a)
#undef HOST_REDUCTION

template <class T> HOST_INLINE T simd_shuffle(T v, ushort lane) {
  return Exchanged<T>(v, 5).at(lane);
}
template <class T> HOST_INLINE T simd_broadcast(T v, ushort lane) {
  return Exchanged<T>(v, 6).at(lane);
}
template <class T> HOST_INLINE T simd_shuffle_xor(T v, ushort mask) {
  const Exchanged<T> all(v, 7);
  return all.at(all.me ^ mask);
}
template <class T> HOST_INLINE T simd_shuffle_down(T v, ushort delta) {
  const Exchanged<T> all(v, 8);
  return all.me + delta < 32 ? all.at(all.me + delta) : v;
}
template <class T> HOST_INLINE T simd_shuffle_up(T v, ushort delta) {
  const Exchanged<T> all(v, 9);
  return all.me >= delta ? all.at(all.me - delta) : v;
}
template <class T>
HOST_INLINE T simd_shuffle_and_fill_up(T v, T filling, ushort delta) {
  const Exchanged<T> all(v, 10);
  return all.me >= delta ? all.at(all.me - delta) : filling;
}
template <class T>
HOST_INLINE T host_prefix_sum(const Exchanged<T>& all, uint32_t end) {
  T sum = T(0);
  for (uint32_t i = 0; i < end; ++i)
    if (all.has(i)) sum = T(sum + all.value[i]);
  return sum;
}
template <class T> HOST_INLINE T simd_prefix_inclusive_sum(T v) {
  const Exchanged<T> all(v, 11);
  return host_prefix_sum(all, all.me + 1);
}
template <class T> HOST_INLINE T simd_prefix_exclusive_sum(T v) {
  const Exchanged<T> all(v, 12);
  return host_prefix_sum(all, all.me);
}

}  // namespace metal
