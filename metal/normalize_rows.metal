// normalize_rows: out[j, :] = m[j] * W[j, :] / || W[j, :] ||, norm[j] = || W[j, :] ||
// paper:     DoRA, arXiv:2402.09353, Eq. 2, read right to left
// in:        weight T [out, in]; magnitude float [out]
// out:       rescaled T [out, in]; norm float [out]
// template:  T float type; N contiguous columns of a thread; STEPS times that many it
//            holds in registers between the two passes, 0 to read the row twice
// launch:    one threadgroup of 32 to 256 per output row; grid (threads * out, 1, 1)
// reference: mlx_dora/kernels/naive.py::normalize_rows
  threadgroup float part[8];
  const uint n = weight_shape[1];
  const uint row = threadgroup_position_in_grid.x;
  const uint lid = thread_position_in_threadgroup.x;
  const uint span = threads_per_threadgroup.x * uint(N);
  const size_t start = size_t(row) * n;
  const uint steps = STEPS ? uint(STEPS) : (n + span - 1) / span;
  float kept[STEPS ? STEPS * N : N];
  float sum[1] = {0.0f};
  for (uint t = 0; t < steps; ++t) {
    thread float* v = kept + (STEPS ? t * uint(N) : 0u);
    const uint c = t * span + lid * uint(N);
    dora_load<N>(weight + start + c, dora_live(c, n), v);
    for (int i = 0; i < N; ++i) {
      sum[0] = metal::fma(v[i], v[i], sum[0]);
    }
  }
  dora_group_sum<1>(
      sum, part, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
      simdgroups_per_threadgroup);
  const float length = metal::precise::sqrt(sum[0]);
  const float gain = dora_gain(magnitude[row], length);
  if (lid == 0) {
    norm[row] = length;
  }
  for (uint t = 0; t < steps; ++t) {
    thread float* v = kept + (STEPS ? t * uint(N) : 0u);
    const uint c = t * span + lid * uint(N);
    if (STEPS == 0) {
      dora_load<N>(weight + start + c, dora_live(c, n), v);
    }
    for (int i = 0; i < N; ++i) {
      v[i] = gain * v[i];
    }
    dora_store<T, N>(v, dora_live(c, n), rescaled + start + c);
  }
