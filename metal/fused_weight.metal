// fused_weight: fused[j, :] = m[j] * W'[j, :] / || W'[j, :] ||, W' = W + up^T down
// paper:     DoRA, arXiv:2402.09353, Eq. 5; up = s B, down = A^T
// in:        weight T [out, in]; down float [R, in]; up float [R, out];
//            magnitude float [out]
// out:       fused T [out, in]
// template:  T float type; R rank; ROWS rows of a threadgroup; STEPS times 4 contiguous
//            columns of these that a thread holds in registers between the two passes,
//            0 to read the rows twice
// launch:    one threadgroup of 32 to 256 per ROWS output rows;
//            grid (threads * ceil(out / ROWS), 1, 1)
// reference: mlx_dora/kernels/naive.py::fused_weight
  constexpr int N = 4;  // `down` is what is read most: 16 bytes of it
  constexpr int HELD = STEPS ? STEPS : 1;
  threadgroup float tile[ROWS * R];
  threadgroup float part[ROWS * 8];
  const uint out = weight_shape[0];
  const uint n = weight_shape[1];
  const uint lid = thread_position_in_threadgroup.x;
  const uint span = threads_per_threadgroup.x * uint(N);
  const uint row0 = threadgroup_position_in_grid.x * uint(ROWS);
  const uint rows = dora_live(row0, out);
  const bool is_wide =
      dora_is_wide<T, N>(weight, n) && dora_is_wide<T, N>(fused, n);
  const bool is_wide_down = dora_is_wide<float, N>(down, n);
  dora_stage_rows<R, ROWS>(up, tile, row0, out, lid, threads_per_threadgroup.x);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float v[HELD * ROWS * N];
  float sums[ROWS] = {0.0f};
  for (uint c = lid * uint(N); c < n; c += uint(HELD) * span) {
    dora_adapted<T, R, ROWS, N, HELD>(
        weight, down, tile, row0, rows, c, n, span, is_wide, is_wide_down, v);
#pragma unroll
    for (int i = 0; i < HELD * ROWS * N; ++i) {
      sums[i / N % ROWS] = metal::fma(v[i], v[i], sums[i / N % ROWS]);
    }
    if (STEPS) {
      break;  // the threadgroup holds whole rows
    }
  }
  dora_group_sum<ROWS>(
      sums, part, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
      simdgroups_per_threadgroup);
  for (uint c = lid * uint(N); c < n; c += uint(HELD) * span) {
    if (STEPS == 0) {
      dora_adapted<T, R, ROWS, N, HELD>(
          weight, down, tile, row0, rows, c, n, span, is_wide, is_wide_down, v);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (uint(r) < rows) {
        const uint row = row0 + uint(r);
        const float gain =
            dora_gain(magnitude[row], metal::precise::sqrt(sums[r]));
#pragma unroll
        for (int t = 0; t < HELD; ++t) {
          const uint at = c + uint(t) * span;
          float scaled[N];
#pragma unroll
          for (int i = 0; i < N; ++i) {
            scaled[i] = gain * v[(t * ROWS + r) * N + i];
          }
          dora_store<T, N>(
              scaled, dora_live(at, n), is_wide, fused + size_t(row) * n + at);
        }
      }
    }
    if (STEPS) {
      break;
    }
  }
