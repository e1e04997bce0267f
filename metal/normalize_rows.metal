// normalize_rows: out[j, :] = m[j] * W[j, :] / || W[j, :] ||, norm[j] = || W[j, :] ||
// paper:     DoRA, arXiv:2402.09353, Eq. 2, read right to left
// in:        weight T [out, in]; magnitude float [out]
// out:       rescaled T [out, in]; norm float [out]
// template:  T float type; STEPS vectors of 16 bytes that a thread holds of the row
//            between the two passes, 0 to read the row twice
// launch:    one threadgroup of 32 to 256 per output row; grid (threads * out, 1, 1)
// reference: mlx_dora/kernels/naive.py::normalize_rows
  constexpr int N = 16 / int(sizeof(T));  // contiguous columns of a thread
  constexpr int HELD = STEPS ? STEPS : 1;
  threadgroup float part[8];
  const uint n = weight_shape[1];
  const uint row = threadgroup_position_in_grid.x;
  const uint lid = thread_position_in_threadgroup.x;
  const uint span = threads_per_threadgroup.x * uint(N);
  const size_t start = size_t(row) * n;
  const bool is_wide =
      dora_is_wide<T, N>(weight, n) && dora_is_wide<T, N>(rescaled, n);
  dora_values<T, N> kept[HELD];
  float sum[1] = {0.0f};
  for (uint c = lid * uint(N); c < n; c += uint(HELD) * span) {
#pragma unroll
    for (int t = 0; t < HELD; ++t) {
      const uint at = c + uint(t) * span;
      dora_read<T, N>(weight + start + at, dora_live(at, n), is_wide, kept[t]);
    }
#pragma unroll
    for (int i = 0; i < HELD * N; ++i) {
      const float w = dora_value<T, N>(kept[i / N], i % N);
      sum[0] = metal::fma(w, w, sum[0]);
    }
    if (STEPS) {
      break;  // the threadgroup holds the whole row
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
  for (uint c = lid * uint(N); c < n; c += uint(HELD) * span) {
#pragma unroll
    for (int t = 0; t < HELD; ++t) {
      const uint at = c + uint(t) * span;
      const uint live = dora_live(at, n);
      if (STEPS == 0) {
        dora_read<T, N>(weight + start + at, live, is_wide, kept[t]);
      }
      float v[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        v[i] = gain * dora_value<T, N>(kept[t], i);
      }
      dora_store<T, N>(v, live, is_wide, rescaled + start + at);
    }
    if (STEPS) {
      break;
    }
  }
