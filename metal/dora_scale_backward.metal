// dora_scale_backward: scaled[t, j] = gain[j] * dy[t, j], and for each chunk of tokens
//            the sums over t of dy * (o - offset) and, with an offset, of dy
// paper:     DoRA, arXiv:2402.09353, section 4.3: the norm is a constant
// in:        dy T [tokens, out]; o T [tokens, out]; gain float [out];
//            offset float [out] (any array of floats without HAS_OFFSET)
// out:       scaled T [tokens, out]; partial float [1 + HAS_OFFSET, chunks, out]
// template:  T float type; HAS_OFFSET
// launch:    one threadgroup of 128 per chunk of tokens and 32 * N columns, N being 16
//            bytes of dy; grid (128 * chunks, ceil(out / (32 * N)), 1)
// reference: mlx_dora/kernels/naive.py::rescale, its gradients
  constexpr int N = 16 / int(sizeof(T));  // contiguous columns of a thread
  constexpr int SUMS = HAS_OFFSET ? 2 : 1;
  constexpr int COLS = 32 * N;
  threadgroup float part[SUMS * 4 * COLS];
  const uint tokens = dy_shape[0];
  const uint out = dy_shape[1];
  const uint lid = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  const uint chunk = threadgroup_position_in_grid.x;
  const uint chunks = threadgroups_per_grid.x;
  const uint length = dora_rounds(tokens, chunks, 1);
  const uint first = chunk * length;
  const uint c0 = threadgroup_position_in_grid.y * uint(COLS);
  const uint c = c0 + lane * uint(N);
  const uint live = dora_live(c, out);
  const bool is_wide = dora_is_wide<T, N>(dy, out) && dora_is_wide<T, N>(o, out) &&
      dora_is_wide<T, N>(scaled, out);
  const bool is_wide_row =
      dora_is_wide<float, N>(gain, out) && dora_is_wide<float, N>(offset, out);
  float g[N];
  float shift[N];
  dora_read_floats<N>(gain + c, live, is_wide_row, g);
  dora_read_floats<N>(offset + c, HAS_OFFSET ? live : 0u, is_wide_row, shift);
  float sums[SUMS * N] = {0.0f};
  for (uint t = sg; t < length; t += 4) {
    const uint row = first + t;
    const uint rest = row < tokens ? live : 0u;
    dora_values<T, N> pulls;
    dora_values<T, N> values;
    dora_read<T, N>(dy + size_t(row) * out + c, rest, is_wide, pulls);
    dora_read<T, N>(o + size_t(row) * out + c, rest, is_wide, values);
    float pull[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      pull[i] = dora_value<T, N>(pulls, i);
      const float value = dora_value<T, N>(values, i) - shift[i];
      sums[i] = metal::fma(pull[i], value, sums[i]);
      if (HAS_OFFSET) {
        sums[(SUMS - 1) * N + i] += pull[i];
      }
      pull[i] = g[i] * pull[i];
    }
    dora_store<T, N>(pull, rest, is_wide, scaled + size_t(row) * out + c);
  }
  for (int k = 0; k < SUMS; ++k) {
    for (int i = 0; i < N; ++i) {
      part[(uint(k) * 4 + sg) * uint(COLS) + uint(i) * 32 + lane] = sums[k * N + i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = lid; j < uint(SUMS * COLS); j += 128) {
    const uint k = j / uint(COLS);
    const uint col = j % uint(COLS);
    float total = 0.0f;
    for (uint from = 0; from < 4; ++from) {
      total +=
          part[(k * 4 + from) * uint(COLS) + (col % uint(N)) * 32 + col / uint(N)];
    }
    if (c0 + col < out) {
      partial[(size_t(k) * chunks + chunk) * out + c0 + col] = total;
    }
  }
