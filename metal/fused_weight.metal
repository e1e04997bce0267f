// fused_weight: fused[j, :] = m[j] * (W + s * BA)[j, :] / || (W + s * BA)[j, :] ||
// paper:     DoRA, arXiv:2402.09353, Eq. 5
// in:        weight T [out, in]; lora_a float [in, R]; lora_b float [R, out];
//            scale float [1]; magnitude float [out]
// out:       fused T [out, in]
// template:  T float type; R rank; ROWS rows of a threadgroup; N contiguous columns of
//            a thread; STEPS times that many of a row it holds in registers between
//            the two passes, 0 to read the rows twice
// launch:    one threadgroup of 32 to 256 per ROWS output rows;
//            grid (threads * ceil(out / ROWS), 1, 1)
// reference: mlx_dora/kernels/naive.py::fused_weight
  threadgroup float b_tile[ROWS * R];
  threadgroup float part[ROWS * 8];
  const uint out = weight_shape[0];
  const uint n = weight_shape[1];
  const uint lid = thread_position_in_threadgroup.x;
  const uint lsize = threads_per_threadgroup.x;
  const uint span = lsize * uint(N);
  const uint row0 = threadgroup_position_in_grid.x * uint(ROWS);
  const float s = scale[0];
  dora_stage_b<R, R, ROWS>(lora_b, b_tile, row0, out, 0u, lid, lsize);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint steps = STEPS ? uint(STEPS) : (n + span - 1) / span;
  float kept[(STEPS ? STEPS : 1) * ROWS * N];
  float sums[ROWS] = {0.0f};
#pragma unroll
  for (uint t = 0; t < steps; ++t) {
    thread float* v = kept + (STEPS ? t * uint(ROWS * N) : 0u);
    const uint c = t * span + lid * uint(N);
    dora_adapted<R, ROWS, N>(weight, lora_a, b_tile, s, row0, out, c, n, v);
    for (int r = 0; r < ROWS; ++r) {
      for (int i = 0; i < N; ++i) {
        sums[r] = metal::fma(v[r * N + i], v[r * N + i], sums[r]);
      }
    }
  }
  dora_group_sum<ROWS>(
      sums, part, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
      simdgroups_per_threadgroup);
#pragma unroll
  for (uint t = 0; t < steps; ++t) {
    thread float* v = kept + (STEPS ? t * uint(ROWS * N) : 0u);
    const uint c = t * span + lid * uint(N);
    if (STEPS == 0) {
      dora_adapted<R, ROWS, N>(weight, lora_a, b_tile, s, row0, out, c, n, v);
    }
    for (int r = 0; r < ROWS; ++r) {
      const uint row = row0 + uint(r);
      if (row < out) {
        const float gain =
            dora_gain(magnitude[row], metal::precise::sqrt(sums[r]));
        for (int i = 0; i < N; ++i) {
          v[r * N + i] = gain * v[r * N + i];
        }
        dora_store<T, N>(v + r * N, dora_live(c, n), fused + size_t(row) * n + c);
      }
    }
  }
