// dora_scale: o[t, j] = gain[j] * (y[t, j] + (h up)[t, j]) + offset[j]
// paper:     DoRA, arXiv:2402.09353, Eq. 5, on activations: gain = m / norm, up = s B
// in:        y T [tokens, out]; h T [tokens, R]; up float [R, out]; gain float [out];
//            offset float [out] (any array of floats without HAS_OFFSET)
// out:       composed T [tokens, out]
// template:  T float type; R rank; ROWS tokens of a threadgroup; N contiguous columns
//            of a thread; HAS_OFFSET
// launch:    one threadgroup of 32 to 256 per ROWS tokens and threads * N columns;
//            grid (threads * ceil(tokens / ROWS), ceil(out / (threads * N)), 1)
// reference: mlx_dora/kernels/naive.py::rescale
  threadgroup float h_tile[ROWS * R];
  const uint tokens = y_shape[0];
  const uint out = y_shape[1];
  const uint lid = thread_position_in_threadgroup.x;
  const uint lsize = threads_per_threadgroup.x;
  const uint row0 = threadgroup_position_in_grid.x * uint(ROWS);
  const uint c = (threadgroup_position_in_grid.y * lsize + lid) * uint(N);
  const uint live = dora_live(c, out);
  for (uint i = lid; i < uint(ROWS * R); i += lsize) {
    h_tile[i] = row0 + i / uint(R) < tokens
        ? static_cast<float>(h[size_t(row0) * uint(R) + i]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float v[ROWS * N];
  for (int r = 0; r < ROWS; ++r) {
    const uint row = row0 + uint(r);
    dora_load<N>(y + size_t(row) * out + c, row < tokens ? live : 0u, v + r * N);
  }
  for (int k = 0; k < R; ++k) {
    float b[N];
    dora_load<N>(up + size_t(k) * out + c, live, b);
    for (int r = 0; r < ROWS; ++r) {
      const float hk = h_tile[r * R + k];
      for (int i = 0; i < N; ++i) {
        v[r * N + i] = metal::fma(hk, b[i], v[r * N + i]);
      }
    }
  }
  float g[N];
  float shift[N];
  dora_load<N>(gain + c, live, g);
  dora_load<N>(offset + c, HAS_OFFSET ? live : 0u, shift);
  for (int r = 0; r < ROWS; ++r) {
    const uint row = row0 + uint(r);
    for (int i = 0; i < N; ++i) {
      v[r * N + i] = metal::fma(g[i], v[r * N + i], shift[i]);
    }
    dora_store<T, N>(
        v + r * N, row < tokens ? live : 0u, composed + size_t(row) * out + c);
  }
