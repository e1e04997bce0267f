// dora_scale: o[t, j] = g[j] * (y[t, j] + s * (hB)[t, j]) + b[j], g = m / norm
// paper:     DoRA, arXiv:2402.09353, Eq. 5, on activations
// in:        y T [tokens, out]; h T [tokens, R]; lora_b float [R, out];
//            scale float [1]; m float [out]; norm float [out]; bias float [out]
//            (any array of floats without HAS_BIAS)
// out:       composed T [tokens, out]
// template:  T float type; R rank; ROWS tokens of a threadgroup; N contiguous columns
//            of a thread; HAS_BIAS
// launch:    one threadgroup of 32 to 256 per ROWS tokens and threads * N columns;
//            grid (threads * ceil(tokens / ROWS), ceil(out / (threads * N)), 1)
// reference: mlx_dora/kernels/reference.py::dora_scale
  threadgroup float h_tile[ROWS * R];
  const uint tokens = y_shape[0];
  const uint out = y_shape[1];
  const uint lid = thread_position_in_threadgroup.x;
  const uint lsize = threads_per_threadgroup.x;
  const uint row0 = threadgroup_position_in_grid.x * uint(ROWS);
  const uint c = (threadgroup_position_in_grid.y * lsize + lid) * uint(N);
  const uint live = dora_live(c, out);
  const float s = scale[0];
  for (uint i = lid; i < uint(ROWS * R); i += lsize) {
    h_tile[i] = row0 + i / uint(R) < tokens
        ? s * static_cast<float>(h[size_t(row0) * uint(R) + i]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float v[ROWS * N];
  for (int r = 0; r < ROWS; ++r) {
    const uint row = row0 + uint(r);
    dora_load<N>(y + size_t(row) * out + c, row < tokens ? live : 0u, v + r * N);
  }
  for (int k = 0; k < R; ++k) {
    float b[N];
    dora_load<N>(lora_b + size_t(k) * out + c, live, b);
    for (int r = 0; r < ROWS; ++r) {
      const float hk = h_tile[r * R + k];
      for (int i = 0; i < N; ++i) {
        v[r * N + i] = metal::fma(hk, b[i], v[r * N + i]);
      }
    }
  }
  float length[N];
  float gain[N];
  float offset[N];
  dora_load<N>(m + c, live, gain);
  dora_load<N>(norm + c, live, length);
  dora_load<N>(bias + c, HAS_BIAS ? live : 0u, offset);
  for (int i = 0; i < N; ++i) {
    gain[i] = dora_gain(gain[i], length[i]);
  }
  for (int r = 0; r < ROWS; ++r) {
    const uint row = row0 + uint(r);
    for (int i = 0; i < N; ++i) {
      v[r * N + i] = metal::fma(gain[i], v[r * N + i], offset[i]);
    }
    dora_store<T, N>(
        v + r * N, row < tokens ? live : 0u, composed + size_t(row) * out + c);
  }
