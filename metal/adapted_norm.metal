// adapted_norm: norm[j] = || W[j, :] + s * (BA)[j, :] ||, never below 2^-10 of
//            (|| W[j, :] ||^2 + || s * (BA)[j, :] ||^2)^1/2
// paper:     DoRA, arXiv:2402.09353, Eq. 5, denominator
// in:        weight T [out, in]; lora_a float [in, R]; lora_b float [R, out];
//            scale float [1]
// out:       norm float [out]
// template:  R rank; ROWS rows of a simdgroup; N contiguous columns of a thread
// launch:    one threadgroup of 256 per 8 * ROWS output rows;
//            grid (256 * ceil(out / (8 * ROWS)), 1, 1)
// reference: mlx_dora/kernels/naive.py::adapted_norm
  constexpr int K = R < 16 ? R : 16;              // ranks in a tile of A
  constexpr int PADDED = (R + K - 1) / K * K;
  constexpr int TILE = 8 * ROWS;
  constexpr bool ALL_B = PADDED * TILE <= 2048;   // B's rows fit, all ranks at once
  constexpr int BK = ALL_B ? PADDED : K;
  threadgroup float a_tile[K * (32 * N + 1)];
  threadgroup float b_tile[TILE * BK];
  const uint out = weight_shape[0];
  const uint n = weight_shape[1];
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
    float w[ROWS * N];
    float delta[ROWS * N] = {0.0f};
    for (int r = 0; r < ROWS; ++r) {
      const uint row = row0 + own + uint(r);
      dora_load<N>(
          weight + size_t(row) * n + c, row < out ? dora_live(c, n) : 0u, w + r * N);
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
      dora_add_squares<N>(w + r * N, delta + r * N, s, sums + r * 3);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const float length = dora_floored_norm(sums + r * 3, s);
    const uint row = row0 + own + uint(r);
    if (lane == 0 && row < out) {
      norm[row] = length;
    }
  }
