// dora_scale_backward: scaled[t, j] = g[j] * dy[t, j], and for each chunk of tokens the
//            sums over t of dy * (o - b) and, with a bias, of dy
// paper:     DoRA, arXiv:2402.09353, section 4.3: the norm is a constant
// in:        dy T [tokens, out]; o T [tokens, out]; m float [out]; norm float [out];
//            bias float [out] (any array of floats without HAS_BIAS)
// out:       scaled T [tokens, out]; partial float [1 + HAS_BIAS, chunks, out]
// template:  T float type; N contiguous columns of a thread; CHUNK tokens of a
//            threadgroup; HAS_BIAS
// launch:    one threadgroup of 256 per CHUNK tokens and 32 * N columns;
//            grid (256 * ceil(tokens / CHUNK), ceil(out / (32 * N)), 1)
// reference: mlx_dora/kernels/reference.py::dora_scale, its vjp
  constexpr int SUMS = HAS_BIAS ? 2 : 1;
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
  float length[N];
  float gain[N];
  float offset[N];
  dora_load<N>(m + c, live, gain);
  dora_load<N>(norm + c, live, length);
  dora_load<N>(bias + c, HAS_BIAS ? live : 0u, offset);
  for (int i = 0; i < N; ++i) {
    gain[i] = dora_gain(gain[i], length[i]);
  }
  float sums[SUMS * N] = {0.0f};
  for (uint t = sg; t < uint(CHUNK); t += 8) {
    const uint row = chunk * uint(CHUNK) + t;
    const uint rest = row < tokens ? live : 0u;
    float pull[N];
    float value[N];
    dora_load<N>(dy + size_t(row) * out + c, rest, pull);
    dora_load<N>(o + size_t(row) * out + c, rest, value);
    for (int i = 0; i < N; ++i) {
      sums[i] = metal::fma(pull[i], value[i] - offset[i], sums[i]);
      if (HAS_BIAS) {
        sums[(SUMS - 1) * N + i] += pull[i];
      }
      pull[i] = gain[i] * pull[i];
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
    for (uint g = 0; g < 8; ++g) {
      total +=
          part[(k * 8 + g) * uint(COLS) + (col % uint(N)) * 32 + col / uint(N)];
    }
    if (c0 + col < out) {
      partial[(size_t(k) * chunks + chunk) * out + c0 + col] = total;
    }
  }
