// adapted_norm_packed: as adapted_norm, W[j, c] = scale * code + bias of its group
// paper:     DoRA, arXiv:2402.09353, Eq. 5, denominator
// in:        weight uint [out, in * BITS / 32]; scales T [out, in / GROUP];
//            biases T [out, in / GROUP]; lora_a float [in, R]; lora_b float [R, out];
//            scale float [1]
// out:       norm float [out]
// template:  R rank; ROWS rows of a simdgroup; BITS of a code, 2 3 4 5 6 8; GROUP
//            columns that share a scale, a multiple of 8
// launch:    one threadgroup of 256 per 8 * ROWS output rows;
//            grid (256 * ceil(out / (8 * ROWS)), 1, 1)
// reference: mlx_dora/kernels/naive.py::adapted_norm
  constexpr int N = 8;                            // columns of a thread
  constexpr int K = R < 8 ? R : 8;                // ranks in a tile of A
  constexpr int PADDED = (R + K - 1) / K * K;
  constexpr int TILE = 8 * ROWS;
  constexpr bool ALL_B = PADDED * TILE <= 2048;   // B's rows fit, all ranks at once
  constexpr int BK = ALL_B ? PADDED : K;
  constexpr int WORDS = 8 * BITS;                 // of the 256 columns of a simdgroup
  threadgroup float a_tile[K * (32 * N + 1)];
  threadgroup float b_tile[TILE * BK];
  const uint out = weight_shape[0];
  const uint words = weight_shape[1];
  const uint groups = scales_shape[1];
  const uint n = groups * uint(GROUP);
  const uint lid = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint own = simdgroup_index_in_threadgroup * uint(ROWS);
  const uint row0 = threadgroup_position_in_grid.x * uint(TILE);
  const float s = scale[0];
  if (ALL_B) {
    dora_stage_b<R, BK, TILE>(lora_b, b_tile, row0, out, 0u, lid, 256u);
  }
  float sums[ROWS * 3] = {0.0f};
  for (uint c0 = 0; c0 < n; c0 += uint(32 * N)) {
    const uint c = c0 + lane * uint(N);
    const uint word = c0 / 32 * uint(BITS) + lane;
    const uint live = metal::min(words - c0 / 32 * uint(BITS), uint(WORDS));
    uint first[ROWS];
    uint second[ROWS];
    float factor[ROWS];
    float offset[ROWS];
    float delta[ROWS * N] = {0.0f};
    for (int r = 0; r < ROWS; ++r) {
      const uint row = row0 + own + uint(r);
      const size_t line = size_t(row) * words;
      const size_t group = size_t(row) * groups + c / uint(GROUP);
      const bool is_first = row < out && lane < live;
      const bool is_second = row < out && lane + 32 < live;
      first[r] = is_first ? weight[line + word] : 0u;
      second[r] = is_second ? weight[line + word + 32] : 0u;
      const bool is_inside = row < out && lane < (n - c0) / uint(N);
      factor[r] = is_inside ? static_cast<float>(scales[group]) : 0.0f;
      offset[r] = is_inside ? static_cast<float>(biases[group]) : 0.0f;
    }
    for (int k0 = 0; k0 < R; k0 += K) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been read
      dora_stage_a<R, K, N>(lora_a, a_tile, c0, n, uint(k0), lid, 256u);
      if (!ALL_B) {
        dora_stage_b<R, BK, TILE>(lora_b, b_tile, row0, out, uint(k0), lid, 256u);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      dora_add_product<ROWS, N, K, BK>(
          a_tile, b_tile + own * uint(BK) + (ALL_B ? k0 : 0), lane, delta);
    }
    for (int r = 0; r < ROWS; ++r) {
      float w[N];
      dora_unpack<BITS>(first[r], second[r], lane, w);
      for (int i = 0; i < N; ++i) {
        w[i] = metal::fma(factor[r], w[i], offset[r]);
      }
      dora_add_squares<N>(w, delta + r * N, s, sums + r * 3);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const float length = dora_floored_norm(sums + r * 3, s);
    const uint row = row0 + own + uint(r);
    if (lane == 0 && row < out) {
      norm[row] = length;
    }
  }
