// dora_scale_backward: scaled[t, j] = gain[j] * dy[t, j], and for each chunk of tokens
//            the sums over t of dy * (o - offset) and, with an offset, of dy
// paper:     DoRA, arXiv:2402.09353, section 4.3: the norm is a constant
// in:        dy T [tokens, out]; o T [tokens, out]; gain float [out];
//            offset float [out] (any array of floats without HAS_OFFSET)
// out:       scaled T [tokens, out]; partial float [1 + HAS_OFFSET, chunks, out]
// template:  T float type; N contiguous columns of a thread; CHUNK tokens of a
//            threadgroup; HAS_OFFSET
// launch:    one threadgroup of 256 per CHUNK tokens and 32 * N columns;
//            grid (256 * ceil(tokens / CHUNK), ceil(out / (32 * N)), 1)
// reference: mlx_dora/kernels/naive.py::rescale, its gradients
  constexpr int SUMS = HAS_OFFSET ? 2 : 1;
  constexpr int COLS = 32 * N;
  threadgroup float part[SUMS * 8 * COLS];
  const uint tokens = dy_shape[0];
  const uint out = dy_shape[1];
  const uint lid = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  const uint chunk = threadgroup_position_in_grid.x;
  const uint chunks = threadgroups_per_grid.x;
  const uint c0 = threadgroup_position_in_grid.y * uint(COLS);
  const uint c = c0 + lane * uint(N);
  const uint live = dora_live(c, out);
  float g[N];
  float shift[N];
  dora_load<N>(gain + c, live, g);
  dora_load<N>(offset + c, HAS_OFFSET ? live : 0u, shift);
  float sums[SUMS * N] = {0.0f};
  for (uint t = sg; t < uint(CHUNK); t += 8) {
    const uint row = chunk * uint(CHUNK) + t;
    const uint rest = row < tokens ? live : 0u;
    float pull[N];
    float value[N];
    dora_load<N>(dy + size_t(row) * out + c, rest, pull);
    dora_load<N>(o + size_t(row) * out + c, rest, value);
    for (int i = 0; i < N; ++i) {
      sums[i] = metal::fma(pull[i], value[i] - shift[i], sums[i]);
      if (HAS_OFFSET) {
        sums[(SUMS - 1) * N + i] += pull[i];
      }
      pull[i] = g[i] * pull[i];
    }
    dora_store<T, N>(pull, rest, scaled + size_t(row) * out + c);
  }
  for (int k = 0; k < SUMS; ++k) {
    for (int i = 0; i < N; ++i) {
      part[(uint(k) * 8 + sg) * uint(COLS) + uint(i) * 32 + lane] = sums[k * N + i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = lid; j < uint(SUMS * COLS); j += 256) {
    const uint k = j / uint(COLS);
    const uint col = j % uint(COLS);
    float total = 0.0f;
    for (uint from = 0; from < 8; ++from) {
      total +=
          part[(k * 8 + from) * uint(COLS) + (col % uint(N)) * 32 + col / uint(N)];
    }
    if (c0 + col < out) {
      partial[(size_t(k) * chunks + chunk) * out + c0 + col] = total;
    }
  }
