// dora_scale: o[t, j] = gain[j] * (y[t, j] + (h up)[t, j]) + offset[j]
// paper:     DoRA, arXiv:2402.09353, Eq. 5, on activations: gain = m / norm, up = s B
// in:        y T [tokens, out]; h T [tokens, R]; up float [R, out]; gain float [out];
//            offset float [out] (any array of floats without HAS_OFFSET)
// out:       composed T [tokens, out]
// template:  T float type; R rank; ROWS tokens of a threadgroup, 1 or 8; HAS_OFFSET
// launch:    one threadgroup of 32 to 256 per ROWS tokens and threads * 4 columns;
//            grid (threads * ceil(tokens / ROWS), ceil(out / (threads * 4)), 1)
// reference: mlx_dora/kernels/naive.py::rescale
  constexpr int N = 4;  // `up` is what is read most: 16 bytes of it
  threadgroup float tile[ROWS * R];
  const uint tokens = y_shape[0];
  const uint out = y_shape[1];
  const uint lid = thread_position_in_threadgroup.x;
  const uint lsize = threads_per_threadgroup.x;
  const uint row0 = threadgroup_position_in_grid.x * uint(ROWS);
  const uint c = (threadgroup_position_in_grid.y * lsize + lid) * uint(N);
  const uint live = dora_live(c, out);
  const bool is_wide = dora_is_wide<T, N>(y, out);
  for (uint i = lid; i < uint(ROWS * R); i += lsize) {
    tile[i % uint(R) * uint(ROWS) + i / uint(R)] = row0 + i / uint(R) < tokens
        ? static_cast<float>(h[size_t(row0) * uint(R) + i]) : 0.0f;
  }
  const uint rows = dora_live(row0, tokens);
  dora_values<T, N> raw[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    dora_read<T, N>(
        y + size_t(row0 + uint(r)) * out + c, uint(r) < rows ? live : 0u, is_wide,
        raw[r]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float v[ROWS * N];
#pragma unroll
  for (int i = 0; i < ROWS * N; ++i) {
    v[i] = dora_value<T, N>(raw[i / N], i % N);
  }
  dora_add_product<R, ROWS, N, 1>(up, out, c, 0u, dora_is_wide<float, N>(up, out), tile, v);
  // The same numbers, but new to the compiler, which else keeps every row's offset and
  // bounds in registers from the loads to the stores.
  const uint step = simd_shuffle(out, ushort(0));
  const uint left = dora_live(row0, simd_shuffle(tokens, ushort(0)));
  const uint rest = dora_live(c, step);
  const bool is_wide_out = dora_is_wide<T, N>(composed, step);
  float g[N];
  float shift[N];
  dora_read_floats<N>(gain + c, rest, dora_is_wide<float, N>(gain, step), g);
  dora_read_floats<N>(
      offset + c, HAS_OFFSET ? rest : 0u, dora_is_wide<float, N>(offset, step), shift);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[r * N + i] = metal::fma(g[i], v[r * N + i], shift[i]);
    }
    dora_store<T, N>(
        v + r * N, uint(r) < left ? rest : 0u, is_wide_out,
        composed + size_t(row0 + uint(r)) * step + c);
  }
