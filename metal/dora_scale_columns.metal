// dora_scale_columns: sums[0, j] = the sum over chunks of partial[0, :, j], over gain[j]
//            (0 where the gain is 0); sums[1, j] = that of partial[1, :, j]
// paper:     DoRA, arXiv:2402.09353, Eq. 6: the gradient of the gain m / norm
// in:        partial float [SUMS, chunks, out]; gain float [out]
// out:       sums float [SUMS, out]
// template:  none; SUMS is 1, or 2 with an offset
// launch:    one threadgroup of 256 per 32 columns; grid (256 * ceil(out / 32), SUMS, 1)
// reference: mlx_dora/kernels/naive.py::rescale, its gradients
  threadgroup float part[256];
  const uint chunks = partial_shape[1];
  const uint out = partial_shape[2];
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  const uint col = threadgroup_position_in_grid.x * 32 + lane;
  const uint which = threadgroup_position_in_grid.y;
  float total = dora_chunk_sum(
      partial + size_t(which) * chunks * out, chunks, out, col, part, lane, sg);
  if (sg == 0 && col < out) {
    if (which == 0) {
      const float g = gain[col];
      total = g != 0.0f ? total / g : 0.0f;
    }
    sums[size_t(which) * out + col] = total;
  }
