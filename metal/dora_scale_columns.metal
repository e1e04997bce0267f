// dora_scale_columns: sums[0, j] = the sum over chunks of partial[0, :, j], over gain[j]
//            (0 where the gain is 0); sums[1, j] = that of partial[1, :, j]
// paper:     DoRA, arXiv:2402.09353, Eq. 6: the gradient of the gain m / norm
// in:        partial float [SUMS, chunks, out]; gain float [out]
// out:       sums float [SUMS, out]
// template:  none; SUMS is 1, or 2 with an offset
// launch:    a thread per column, in threadgroups of 256;
//            grid (256 * ceil(out / 256), SUMS, 1)
// reference: mlx_dora/kernels/naive.py::rescale, its gradients
  const uint chunks = partial_shape[1];
  const uint out = partial_shape[2];
  const uint col = thread_position_in_grid.x;
  const uint which = threadgroup_position_in_grid.y;
  if (col < out) {
    float total = 0.0f;
    for (uint chunk = 0; chunk < chunks; ++chunk) {
      total += partial[(size_t(which) * chunks + chunk) * out + col];
    }
    if (which == 0) {
      const float g = gain[col];
      total = g != 0.0f ? total / g : 0.0f;
    }
    sums[size_t(which) * out + col] = total;
  }
