// adapted_norm_total: second stage: norm[j], never below 2^-10 of the root of the sum of
//            squares of W[j, :] and of its update
// paper:     DoRA, arXiv:2402.09353, Eq. 5, denominator
// in:        partial float [2, strips, out], of adapted_norm or adapted_norm_packed
// out:       norm float [out]
// template:  none
// launch:    one threadgroup of 256 per 32 output rows; grid (256 * ceil(out / 32), 1, 1)
// reference: mlx_dora/kernels/naive.py::adapted_norm
  threadgroup float apart_part[256];
  threadgroup float part[256];
  const uint strips = partial_shape[1];
  const uint out = partial_shape[2];
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  const uint row = threadgroup_position_in_grid.x * 32 + lane;
  const float apart = dora_chunk_sum(partial, strips, out, row, apart_part, lane, sg);
  const float together = dora_chunk_sum(
      partial + size_t(strips) * out, strips, out, row, part, lane, sg);
  if (sg == 0 && row < out) {
    norm[row] =
        metal::precise::sqrt(metal::max(together, 9.5367431640625e-07f * apart));
  }
