// Functions that the kernels of mlx_dora share.
//
// MLX looks for thread attributes and shapes in a kernel's body alone, so they come in
// as arguments; and it hands over arrays of fewer than 8 elements in `constant` memory,
// not `device`, so pointers into arrays are template parameters.
//
// Matrices are row-major: W (out, in), lora_a (in, R), lora_b (R, out).

#ifndef MLX_DORA_COMMON_H
#define MLX_DORA_COMMON_H

// N contiguous values as float, 0 from the `live`-th on.
template <int N, typename P>
METAL_FUNC void dora_load(P from, uint live, thread float* to) {
  if (live >= uint(N)) {
    for (int i = 0; i < N; ++i) {
      to[i] = static_cast<float>(from[i]);
    }
  } else {
    for (int i = 0; i < N; ++i) {
      to[i] = uint(i) < live ? static_cast<float>(from[i]) : 0.0f;
    }
  }
}

// The first `live` of N values, rounded once to T.
template <typename T, int N, typename P>
METAL_FUNC void dora_store(thread const float* from, uint live, P to) {
  if (live >= uint(N)) {
    for (int i = 0; i < N; ++i) {
      to[i] = static_cast<T>(from[i]);
    }
  } else {
    for (int i = 0; i < N - 1; ++i) {
      if (uint(i) < live) {
        to[i] = static_cast<T>(from[i]);
      }
    }
  }
}

// How many of the columns from c on exist.
METAL_FUNC uint dora_live(uint c, uint n) {
  return n - metal::min(c, n);
}

// g = m / norm; a row without a direction has g = 0.
METAL_FUNC float dora_gain(float m, float norm) {
  return norm > 0.0f ? m / norm : 0.0f;
}

// Sums of ROWS values over the whole threadgroup, returned to every thread.
// `part` holds ROWS floats a simdgroup; at most 32 simdgroups. One barrier: every
// simdgroup repeats the last reduction.
template <int ROWS>
METAL_FUNC void dora_group_sum(
    thread float* v, threadgroup float* part, uint lane, uint sg, uint nsg) {
  for (int r = 0; r < ROWS; ++r) {
    const float sum = simd_sum(v[r]);
    if (lane == 0) {
      part[uint(r) * nsg + sg] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int r = 0; r < ROWS; ++r) {
    v[r] = simd_sum(lane < nsg ? part[uint(r) * nsg + lane] : 0.0f);
  }
}

// lora_b[k0 .. k0 + K, row0 .. row0 + ROWS) transposed into tile[row * K + k], with 0
// where there is no such rank or row.
template <int R, int K, int ROWS, typename P>
METAL_FUNC void dora_stage_b(
    P lora_b, threadgroup float* tile, uint row0, uint out, uint k0,
    uint lid, uint lsize) {
  for (uint i = lid; i < uint(K * ROWS); i += lsize) {
    const uint k = i / uint(ROWS);
    const uint row = i % uint(ROWS);
    const bool is_inside = k0 + k < uint(R) && row0 + row < out;
    tile[row * uint(K) + k] =
        is_inside ? lora_b[size_t(k0 + k) * out + row0 + row] : 0.0f;
  }
}

// lora_a[c0 .. c0 + 32 * N, k0 .. k0 + K), with 0 outside. Column c0 + lane * N + i
// goes where the lanes that read it touch neighbouring words; the odd row length
// spreads the writes over the banks.
template <int R, int K, int N, typename P>
METAL_FUNC void dora_stage_a(
    P lora_a, threadgroup float* tile, uint c0, uint n, uint k0,
    uint lid, uint lsize) {
  for (uint i = lid; i < uint(K * 32 * N); i += lsize) {
    const uint col = i / uint(K);
    const uint k = i % uint(K);
    const bool is_inside = k0 + k < uint(R) && c0 + col < n;
    tile[k * uint(32 * N + 1) + (col % uint(N)) * 32 + col / uint(N)] =
        is_inside ? lora_a[size_t(c0 + col) * uint(R) + k0 + k] : 0.0f;
  }
}

// delta[r, i] += sum over k < K of B[r, k] * A[column i of this lane, k], from tiles.
// B's rows are STRIDE apart.
template <int ROWS, int N, int K, int STRIDE>
METAL_FUNC void dora_add_product(
    const threadgroup float* a_tile, const threadgroup float* b_tile, uint lane,
    thread float* delta) {
  for (int k = 0; k < K; ++k) {
    float a[N];
    for (int i = 0; i < N; ++i) {
      a[i] = a_tile[uint(k * (32 * N + 1) + i * 32) + lane];
    }
    for (int r = 0; r < ROWS; ++r) {
      const float b = b_tile[r * STRIDE + k];
      for (int i = 0; i < N; ++i) {
        delta[r * N + i] = metal::fma(b, a[i], delta[r * N + i]);
      }
    }
  }
}

// Adds one lane's N columns to the sums of squares of one row: of w, of delta and of
// w + s * delta, in this order in `sums`.
template <int N>
METAL_FUNC void dora_add_squares(
    thread const float* w, thread const float* delta, float s, thread float* sums) {
  for (int i = 0; i < N; ++i) {
    const float x = metal::fma(s, delta[i], w[i]);
    sums[0] = metal::fma(w[i], w[i], sums[0]);
    sums[1] = metal::fma(delta[i], delta[i], sums[1]);
    sums[2] = metal::fma(x, x, sums[2]);
  }
}

// The norm of a row from a simdgroup's shares of these sums, never below 2^-10 of
// (w^2 + s^2 delta^2)^1/2: the same floor as the reference's.
METAL_FUNC float dora_floored_norm(thread const float* sums, float s) {
  const float base = simd_sum(sums[0]);
  const float update = simd_sum(sums[1]);
  const float adapted = simd_sum(sums[2]);
  const float floor2 = 9.5367431640625e-07f * metal::fma(s * s, update, base);
  return metal::precise::sqrt(metal::max(adapted, floor2));
}

// v[r, i] = (W + s * BA)[row0 + r, c + i], 0 where there is none. b_tile holds B's rows
// with all ranks. A thread takes 8 ranks of a column of A at once: neighbours in memory.
template <int R, int ROWS, int N, typename WP, typename AP>
METAL_FUNC void dora_adapted(
    WP weight, AP lora_a, const threadgroup float* b_tile, float s, uint row0,
    uint out, uint c, uint n, thread float* v) {
  constexpr int K = R < 8 ? R : 8;
  const uint live = dora_live(c, n);
  float delta[ROWS * N] = {0.0f};
  for (int i = 0; i < N; ++i) {
    if (uint(i) < live) {
      const AP column = lora_a + size_t(c + uint(i)) * uint(R);
      for (int k0 = 0; k0 < R; k0 += K) {
        float a[K];
        dora_load<K>(column + k0, uint(R - k0), a);
        for (int r = 0; r < ROWS; ++r) {
          for (int k = 0; k < K; ++k) {
            if (k0 + k < R) {
              delta[r * N + i] =
                  metal::fma(b_tile[r * R + k0 + k], a[k], delta[r * N + i]);
            }
          }
        }
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const uint row = row0 + uint(r);
    dora_load<N>(weight + size_t(row) * n + c, row < out ? live : 0u, v + r * N);
    for (int i = 0; i < N; ++i) {
      v[r * N + i] = metal::fma(s, delta[r * N + i], v[r * N + i]);
    }
  }
}

// A lane's 8 codes of BITS bits out of a run of 256, which the simdgroup has loaded
// as words: `first` is word `lane` of the run, `second` word `lane + 32`. MLX packs
// codes as one stream of bits, lowest first, across word borders too.
template <int BITS>
METAL_FUNC void dora_unpack(
    uint first, uint second, uint lane, thread float* codes) {
  const uint bit = lane * uint(8 * BITS);
  const uint at = bit / 32;
  const uint shift = bit % 32;
  uint low = first;
  uint high = 0;
  if (BITS == 2) {
    low = simd_shuffle(first, ushort(at));
  } else if (BITS == 3) {
    low = simd_shuffle(first, ushort(at));
    high = simd_shuffle(first, ushort(at + 1));
  } else if (BITS >= 5) {
    const uint next = at + 1;
    const uint low1 = simd_shuffle(first, ushort(at % 32));
    const uint low2 = simd_shuffle(second, ushort(at % 32));
    const uint high1 = simd_shuffle(first, ushort(next % 32));
    const uint high2 = simd_shuffle(second, ushort(next % 32));
    low = at < 32 ? low1 : low2;
    high = next < 32 ? high1 : high2;
  }
  const uint64_t stream = ((uint64_t(high) << 32) | uint64_t(low)) >> shift;
  for (int i = 0; i < 8; ++i) {
    codes[i] = float(uint(stream >> (i * BITS)) & uint((1 << BITS) - 1));
  }
}

#endif  // MLX_DORA_COMMON_H
