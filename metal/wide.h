// Neighboring values moved together: up to 16 bytes at once where the addresses allow.
//
// Pointers into arrays are template parameters, see common.h.

#ifndef MLX_DORA_WIDE_H
#define MLX_DORA_WIDE_H

// 1: neighboring values are accessed up to 16 bytes at a time, from aligned addresses
// only (cuda_prelude.h; tests). 0: the compiler joins accesses, as in MLX's own Metal
// kernels: Apple's chips need no more than aligned elements.
#ifndef DORA_WIDE
#define DORA_WIDE 0
#endif

#if DORA_WIDE
// N values of type E as they lie in memory: of 2 bytes, two to a register. Up to 16 bytes
// are moved at once.
template <typename E, int N>
struct alignas(N * sizeof(E) <= 16 ? N * sizeof(E) : 16) dora_values {
  uint words[N * sizeof(E) / 4];
};

template <typename E, int N>
METAL_FUNC float dora_value(thread const dora_values<E, N>& from, int i) {
  constexpr int PER = 4 / int(sizeof(E));
  const uint word = from.words[i / PER] >> (i % PER * 8 * int(sizeof(E)));
  return static_cast<float>(*reinterpret_cast<thread const E*>(&word));
}

template <typename E, int N>
METAL_FUNC void dora_put_value(thread dora_values<E, N>& to, int i, E value) {
  constexpr int PER = 4 / int(sizeof(E));
  uint word = 0;
  *reinterpret_cast<thread E*>(&word) = value;
  const uint others = i % PER ? to.words[i / PER] : 0u;
  to.words[i / PER] = others | word << (i % PER * 8 * int(sizeof(E)));
}
#else
template <typename E, int N>
struct dora_values {
  E at[N];
};

template <typename E, int N>
METAL_FUNC float dora_value(thread const dora_values<E, N>& from, int i) {
  return static_cast<float>(from.at[i]);
}

template <typename E, int N>
METAL_FUNC void dora_put_value(thread dora_values<E, N>& to, int i, E value) {
  to.at[i] = value;
}
#endif

// Whether a matrix of type E with rows of n values may be accessed N values at a time,
// from columns that are multiples of N on. Slices may start at any element.
template <typename E, int N, typename P>
METAL_FUNC bool dora_is_wide(P matrix, uint n) {
#if DORA_WIDE
  constexpr uint BYTES = sizeof(dora_values<E, N>) < 16 ? sizeof(dora_values<E, N>) : 16;
  return reinterpret_cast<size_t>(matrix) % BYTES == 0 && n * sizeof(E) % BYTES == 0;
#else
  return false;
#endif
}

// N contiguous values, 0 from the `live`-th on. With `is_wide`, `from` is aligned.
template <typename E, int N, typename P>
METAL_FUNC void dora_read(
    P from, uint live, bool is_wide, thread dora_values<E, N>& to) {
#if DORA_WIDE
  if (is_wide && live >= uint(N)) {
    to = *reinterpret_cast<const device dora_values<E, N>*>(from);
  } else {
#else
  if (live >= uint(N)) {
    for (int i = 0; i < N; ++i) {
      to.at[i] = from[i];
    }
  } else {
#endif
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dora_put_value<E, N>(to, i, uint(i) < live ? from[i] : static_cast<E>(0.0f));
    }
  }
}

// The same, of floats.
template <int N, typename P>
METAL_FUNC void dora_read_floats(P from, uint live, bool is_wide, thread float* to) {
  dora_values<float, N> values;
  dora_read<float, N>(from, live, is_wide, values);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[i] = dora_value<float, N>(values, i);
  }
}

// The first `live` of N values, rounded once to T. With `is_wide`, `to` is aligned.
template <typename T, int N, typename P>
METAL_FUNC void dora_store(thread const float* from, uint live, bool is_wide, P to) {
#if DORA_WIDE
  if (is_wide && live >= uint(N)) {
    dora_values<T, N> values;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dora_put_value<T, N>(values, i, static_cast<T>(from[i]));
    }
    *reinterpret_cast<device dora_values<T, N>*>(to) = values;
  } else {
#else
  if (live >= uint(N)) {
    for (int i = 0; i < N; ++i) {
      to[i] = static_cast<T>(from[i]);
    }
  } else {
#endif
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (uint(i) < live) {
        to[i] = static_cast<T>(from[i]);
      }
    }
  }
}

// Four ranks of a tile in threadgroup memory, moved at once.
#if DORA_WIDE
struct alignas(16) dora_quad {
  float at[4];
};

METAL_FUNC float dora_rank(thread const dora_quad& quad, int j) {
  return quad.at[j];
}

METAL_FUNC void dora_put_rank(thread dora_quad& quad, int j, float value) {
  quad.at[j] = value;
}
#else
typedef metal::vec<float, 4> dora_quad;

METAL_FUNC float dora_rank(thread const dora_quad& quad, int j) {
  return quad[j];
}

METAL_FUNC void dora_put_rank(thread dora_quad& quad, int j, float value) {
  quad[j] = value;
}
#endif

#endif  // MLX_DORA_WIDE_H
