// adapted_norm: first stage of norm[j] = || W[j, :] + (up^T A^T)[j, :] ||: for each strip
//            of columns, the sums of squares of W and of the update, and of their sum
// paper:     DoRA, arXiv:2402.09353, Eq. 5, denominator; up = s B
// in:        weight T [out, in]; lora_a float [in, R]; up float [R, out]
// out:       partial float [2, strips, out]
// template:  T float type; R rank
// launch:    one threadgroup of 128 per 4 * ROWS * rounds output rows and 32 * N columns;
//            grid (128 * ceil(out / (4 * ROWS * rounds)), strips, 1)
// reference: mlx_dora/kernels/naive.py::adapted_norm
  // Up to rank 16, 16 bytes of W; beyond, 4 columns and more rows that share A.
  constexpr bool IS_TALL = R > 16;
  constexpr int N = IS_TALL ? 4 : 16 / int(sizeof(T));  // columns of a thread
  constexpr int ROWS = IS_TALL ? 8 : 4;                 // of a simdgroup in a round
  constexpr int QUADS = R < 32 ? (R + 3) / 4 : 8;       // of ranks in a tile
  threadgroup dora_quad tile[33 * N * QUADS];
  const uint out = weight_shape[0];
  const uint n = weight_shape[1];
  const uint lid = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  const uint strip = threadgroup_position_in_grid.y;
  const uint strips = threadgroups_per_grid.y;
  const uint c0 = strip * uint(32 * N);
  const uint c = c0 + lane * uint(N);
  const uint rounds = dora_rounds(out, threadgroups_per_grid.x, 4 * ROWS);
  const uint first = threadgroup_position_in_grid.x * rounds * uint(4 * ROWS);
  const bool is_wide = dora_is_wide<T, N>(weight, n);
  const bool is_wide_a = dora_is_wide<float, 4>(lora_a, uint(R));
  const bool is_wide_up = dora_is_wide<float, ROWS>(up, out);
  for (uint round = 0; round < rounds; ++round) {
    const uint row0 = first + (round * 4 + sg) * uint(ROWS);
    dora_values<T, N> raw[ROWS];
    if (!IS_TALL) {  // on the way while the product is computed
      dora_read_rows<T, ROWS, N>(weight, row0, out, c, n, is_wide, raw);
    }
    float delta[ROWS * N] = {0.0f};
#pragma unroll 1
    for (int k0 = 0; k0 < R; k0 += 4 * QUADS) {
      if (R > 4 * QUADS || round == 0) {
        if (R > 4 * QUADS) {
          threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile has been read
        }
        dora_stage_a<R, QUADS, N>(lora_a, tile, c0, n, uint(k0), is_wide_a, lid);
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      dora_add_tile<R, QUADS, ROWS, N>(
          up, tile, row0, dora_live(row0, out), out, uint(k0), is_wide_up, lane, delta);
    }
    if (IS_TALL) {  // afterwards, for the sake of registers
      dora_read_rows<T, ROWS, N>(weight, row0, out, c, n, is_wide, raw);
    }
    float sums[2 * ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float w[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        w[i] = dora_value<T, N>(raw[r], i);
      }
      dora_sum_squares<ROWS, N>(w, delta + r * N, sums + r);
    }
    dora_put_squares<ROWS>(sums, partial, strip, strips, row0, out, lane);
  }
