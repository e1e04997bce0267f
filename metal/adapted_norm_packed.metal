// adapted_norm_packed: as adapted_norm, W[j, c] = scale * code + bias of its group
// paper:     DoRA, arXiv:2402.09353, Eq. 5, denominator; up = s B
// in:        weight uint [out, in * BITS / 32]; scales T [out, in / GROUP];
//            biases T [out, in / GROUP]; lora_a float [in, R]; up float [R, out]
// out:       partial float [2, strips, out]
// template:  R rank; BITS of a code, 2 3 4 5 6 8; GROUP columns that share a scale, a
//            multiple of 8
// launch:    one threadgroup of 128 per 16 * rounds output rows and 256 columns;
//            grid (128 * ceil(out / (16 * rounds)), strips, 1)
// reference: mlx_dora/kernels/naive.py::adapted_norm
  constexpr int N = 8;                         // columns of a thread: BITS bytes
  constexpr int ROWS = 4;                      // of a simdgroup in a round
  constexpr int QUADS = R < 16 ? (R + 3) / 4 : 4;  // of ranks in a tile
  constexpr int WORDS = 8 * BITS;              // of the 256 columns of a simdgroup
  threadgroup dora_quad tile[33 * N * QUADS];
  const uint out = weight_shape[0];
  const uint words = weight_shape[1];
  const uint groups = scales_shape[1];
  const uint n = groups * uint(GROUP);
  const uint lid = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  const uint strip = threadgroup_position_in_grid.y;
  const uint strips = threadgroups_per_grid.y;
  const uint c0 = strip * uint(32 * N);
  const uint c = c0 + lane * uint(N);
  const uint rounds = dora_rounds(out, threadgroups_per_grid.x, 4 * ROWS);
  const uint first = threadgroup_position_in_grid.x * rounds * uint(4 * ROWS);
  const uint word = c0 / 32 * uint(BITS) + lane;
  const uint live = metal::min(words - c0 / 32 * uint(BITS), uint(WORDS));
  const bool is_wide_a = dora_is_wide<float, 4>(lora_a, uint(R));
  const bool is_wide_up = dora_is_wide<float, ROWS>(up, out);
  for (uint round = 0; round < rounds; ++round) {
    const uint row0 = first + (round * 4 + sg) * uint(ROWS);
    uint low[ROWS];
    uint high[ROWS];
    float factor[ROWS];
    float offset[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const uint row = row0 + uint(r);
      const size_t line = size_t(row) * words;
      const size_t group = size_t(row) * groups + c / uint(GROUP);
      const bool is_low = row < out && lane < live;
      const bool is_high = row < out && lane + 32 < live;
      low[r] = is_low ? weight[line + word] : 0u;
      high[r] = is_high ? weight[line + word + 32] : 0u;
      const bool is_inside = row < out && c < n;
      factor[r] = is_inside ? static_cast<float>(scales[group]) : 0.0f;
      offset[r] = is_inside ? static_cast<float>(biases[group]) : 0.0f;
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
    float sums[2 * ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float w[N];
      dora_unpack<BITS>(low[r], high[r], lane, w);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        w[i] = metal::fma(factor[r], w[i], offset[r]);
      }
      dora_sum_squares<ROWS, N>(w, delta + r * N, sums + r);
    }
    dora_put_squares<ROWS>(sums, partial, strip, strips, row0, out, lane);
  }
