// Functions that the kernels of mlx_dora share. They follow wide.h in a kernel's header.
//
// MLX looks for thread attributes and shapes in a kernel's body alone, so they come in
// as arguments; and it hands over arrays of fewer than 8 elements in `constant` memory,
// not `device`, so pointers into arrays are template parameters.
//
// Matrices are row-major: W (out, in), lora_a (in, R), up (R, out).

#ifndef MLX_DORA_COMMON_H
#define MLX_DORA_COMMON_H

// How many of the columns from c on exist.
METAL_FUNC uint dora_live(uint c, uint n) {
  return n - metal::min(c, n);
}

// How many times `step` rows each of `groups` threadgroups takes, to cover n rows.
METAL_FUNC uint dora_rounds(uint n, uint groups, uint step) {
  const uint units = (n + step - 1) / step;
  return (units + groups - 1) / groups;
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

// Lanes exchange halves of V values: each goes on with the half that it keeps.
template <int V>
METAL_FUNC void dora_fold(thread float* v, uint lane, uint mask) {
  const bool is_upper = (lane & mask) != 0;
#pragma unroll
  for (int i = 0; i < V / 2; ++i) {
    const float kept = is_upper ? v[i + V / 2] : v[i];
    const float given = is_upper ? v[i] : v[i + V / 2];
    v[i] = kept + simd_shuffle_xor(given, ushort(mask));
  }
}

// The sum over the simdgroup of one of V values, 8 or 16: lane l gets that of value
// l / (32 / V). V - 1 + 32 / V / 2 shuffles, where V calls of simd_sum take 5 V.
template <int V>
METAL_FUNC float dora_simd_sums(thread float* v, uint lane) {
  dora_fold<V>(v, lane, 16u);
  dora_fold<V / 2>(v, lane, 8u);
  dora_fold<V / 4>(v, lane, 4u);
  if (V == 16) {
    dora_fold<2>(v, lane, 2u);
  } else {
    v[0] += simd_shuffle_xor(v[0], ushort(2));
  }
  return v[0] + simd_shuffle_xor(v[0], ushort(1));
}

// The sum over chunks of from[chunk, column], (chunks, out), in a threadgroup of 8
// simdgroups with a column a lane. `part` holds 256 floats. Every simdgroup gets it.
template <typename P>
METAL_FUNC float dora_chunk_sum(
    P from, uint chunks, uint out, uint column, threadgroup float* part, uint lane,
    uint sg) {
  float sum = 0.0f;
  for (uint chunk = sg; chunk < chunks; chunk += 8) {
    sum += column < out ? from[size_t(chunk) * out + column] : 0.0f;
  }
  part[sg * 32 + lane] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = 0.0f;
  for (uint from_sg = 0; from_sg < 8; ++from_sg) {
    sum += part[from_sg * 32 + lane];
  }
  return sum;
}

// tile[k * ROWS + row] = matrix[k, row0 + row] of a matrix (R, out), 0 past the last row.
template <int R, int ROWS, typename P>
METAL_FUNC void dora_stage_rows(
    P matrix, threadgroup float* tile, uint row0, uint out, uint lid, uint lsize) {
  for (uint i = lid; i < uint(R * ROWS); i += lsize) {
    const uint row = row0 + i % uint(ROWS);
    tile[i] = row < out ? matrix[size_t(i / uint(ROWS)) * out + row] : 0.0f;
  }
}

// v[s, r, i] += sum over k of tile[k * ROWS + r] * matrix[k, c + s * span + i], of a
// matrix (R, n) and N columns of a thread in each of STEPS steps.
template <int R, int ROWS, int N, int STEPS, typename P>
METAL_FUNC void dora_add_product(
    P matrix, uint n, uint c, uint span, bool is_wide,
    const threadgroup float* tile, thread float* v) {
#pragma unroll 1
  for (int k = 0; k < R; ++k) {
    const P line = matrix + size_t(k) * n;
    float values[STEPS * N];
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      const uint column = c + uint(t) * span;
      dora_read_floats<N>(line + column, dora_live(column, n), is_wide, values + t * N);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float factor = tile[k * ROWS + r];
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          thread float* sum = v + (t * ROWS + r) * N + i;
          *sum = metal::fma(factor, values[t * N + i], *sum);
        }
      }
    }
  }
}

// v[s, r, i] = (W + up^T down)[row0 + r, c + s * span + i], 0 where there is none; the
// tile holds the rows' `up`.
template <typename T, int R, int ROWS, int N, int STEPS, typename WP, typename DP>
METAL_FUNC void dora_adapted(
    WP weight, DP down, const threadgroup float* tile, uint row0, uint rows, uint c,
    uint n, uint span, bool is_wide, bool is_wide_down, thread float* v) {
  dora_values<T, N> raw[STEPS * ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      const uint at = c + uint(t) * span;
      dora_read<T, N>(
          weight + size_t(row0 + uint(r)) * n + at,
          uint(r) < rows ? dora_live(at, n) : 0u, is_wide, raw[t * ROWS + r]);
    }
  }
#pragma unroll
  for (int i = 0; i < STEPS * ROWS * N; ++i) {
    v[i] = dora_value<T, N>(raw[i / N], i % N);
  }
  dora_add_product<R, ROWS, N, STEPS>(down, n, c, span, is_wide_down, tile, v);
}

// ---- the norms: a threadgroup of 4 simdgroups takes a strip of 32 * N columns of
// rounds times 4 * ROWS rows; A's strip lies in a tile, its ranks in quads.

// Where the tile has ranks 4 * quad .. + 3 of column i of a lane: the lanes' shares lie
// next to each other, and the 33rd place spreads the writes over the banks.
METAL_FUNC uint dora_tile_place(uint i, uint quad, uint lane, uint quads) {
  return (i * quads + quad) * 33 + lane;
}

// lora_a[c0 .. c0 + 32 * N, k0 .. k0 + 4 * QUADS) into the tile, with 0 outside. The tile
// holds 33 * N * QUADS quads.
template <int R, int QUADS, int N, typename P>
METAL_FUNC void dora_stage_a(
    P lora_a, threadgroup dora_quad* tile, uint c0, uint n, uint k0, bool is_wide,
    uint lid) {
#pragma unroll 2
  for (uint at = lid; at < uint(32 * N * QUADS); at += 128) {
    const uint column = at / uint(QUADS);
    const uint quad = at % uint(QUADS);
    const uint k = k0 + quad * 4;
    float values[4];
    dora_read_floats<4>(
        lora_a + size_t(c0 + column) * uint(R) + k,
        c0 + column < n ? dora_live(k, uint(R)) : 0u, is_wide, values);
    dora_quad four;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      dora_put_rank(four, j, values[j]);
    }
    tile[dora_tile_place(column % uint(N), quad, column / uint(N), uint(QUADS))] =
        four;
  }
}

// N columns from c on of the rows row0 .. row0 + ROWS, 0 where there is none.
template <typename T, int ROWS, int N, typename P>
METAL_FUNC void dora_read_rows(
    P weight, uint row0, uint out, uint c, uint n, bool is_wide,
    thread dora_values<T, N>* to) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const uint row = row0 + uint(r);
    dora_read<T, N>(
        weight + size_t(row) * n + c, row < out ? dora_live(c, n) : 0u, is_wide, to[r]);
  }
}

// delta[r, i] += sum over the ranks k of the tile of up[k, row0 + r] * A[column i of
// this lane, k]. `rows` of the ROWS exist.
template <int R, int QUADS, int ROWS, int N, typename P>
METAL_FUNC void dora_add_tile(
    P up, const threadgroup dora_quad* tile, uint row0, uint rows, uint out, uint k0,
    bool is_wide, uint lane, thread float* delta) {
#pragma unroll 1
  for (int quad = 0; quad < QUADS; ++quad) {
    float b[4 * ROWS];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint k = k0 + uint(quad * 4 + j);
      dora_read_floats<ROWS>(
          up + size_t(k) * out + row0, k < uint(R) ? rows : 0u, is_wide, b + j * ROWS);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const dora_quad a =
          tile[dora_tile_place(uint(i), uint(quad), lane, uint(QUADS))];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float rank = dora_rank(a, j);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          delta[r * N + i] = metal::fma(b[j * ROWS + r], rank, delta[r * N + i]);
        }
      }
    }
  }
}

// The sums of squares of one row over a thread's N columns: sums[0] of w and of delta,
// sums[ROWS] of w + delta.
template <int ROWS, int N>
METAL_FUNC void dora_sum_squares(
    thread const float* w, thread const float* delta, thread float* sums) {
  float apart = 0.0f;
  float together = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = w[i] + delta[i];
    apart = metal::fma(w[i], w[i], apart);
    apart = metal::fma(delta[i], delta[i], apart);
    together = metal::fma(x, x, together);
  }
  sums[0] = apart;
  sums[ROWS] = together;
}

// partial[0, strip, row0 + r] = the sum of sums[r] over the simdgroup, and
// partial[1, strip, row0 + r] = that of sums[ROWS + r].
template <int ROWS, typename P>
METAL_FUNC void dora_put_squares(
    thread float* sums, P partial, uint strip, uint strips, uint row0, uint out,
    uint lane) {
  const float sum = dora_simd_sums<2 * ROWS>(sums, lane);
  constexpr uint LANES = 16 / ROWS;  // that hold the same sum
  const uint which = lane / 16;
  const uint row = row0 + lane % 16 / LANES;
  if (lane % LANES == 0 && row < out) {
    partial[(size_t(which) * strips + strip) * out + row] = sum;
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
