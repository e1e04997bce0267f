"""Computes the adapted weight, for fuse and export."""

import mlx.core as mx

from mlx_dora.kernels import plain
from mlx_dora.kernels.case import Case
from mlx_dora.kernels.choice import takes_kernel
from mlx_dora.kernels.dispatch import KERNELS, run
from mlx_dora.kernels.plans import plan_fused_weight
from mlx_dora.kernels.trial import Job, normal
from mlx_dora.matrix.low_rank import LowRank
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.sharded import ShardedWeight
from mlx_dora.matrix.weight import Weight, row_blocks

_KERNEL = KERNELS["fused_weight"]


def fused_weight(
    weight: Weight, lora_a: mx.array, lora_b: mx.array, scale: float, m: mx.array
) -> mx.array:
    r"""Compute the adapted weight, for fuse and export.

    .. math:: W'_j = m_j \, (W + s B A)_j / \lVert (W + s B A)_j \rVert_2

    This is Eq. 5 of DoRA (arXiv:2402.09353). Arithmetic is float32, one block of rows
    at a time, with one rounding at the end.

    Args:
        weight: Base weight. Shape ``(out, in)``, any float dtype or packed.
        lora_a: Down projection. Shape ``(in, r)``.
        lora_b: Up projection. Shape ``(r, out)``.
        scale: Multiplier of the low-rank update.
        m: Magnitudes. Shape ``(out,)``.

    Returns:
        The adapted weight, shape ``(out, in)``, in the dtype of `weight`, or of its
        unpacked form if packed.

    Raises:
        DoRAError: If the shapes do not fit together.
    """
    LowRank(lora_a=lora_a, lora_b=lora_b, scale=scale).check_fits(weight.shape)
    assert not isinstance(weight, ShardedWeight)  # layers refuse to fuse it
    out, width = weight.shape
    is_packed = isinstance(weight, QuantizedWeight)
    dtype = weight.scales.dtype if is_packed else weight.dtype
    case = Case("fused_weight", dtype, out, width, lora_a.shape[1])
    if (is_packed and weight.mode != "affine") or not takes_kernel(case, job):
        return plain.fused_weight(weight, lora_a, lora_b, scale, m)
    if not is_packed:
        return launched(weight, lora_a, lora_b, scale, m)
    return mx.concatenate(  # unpacked a block at a time
        [
            launched(block, lora_a, lora_b[:, index], scale, m[index])
            for index, block in row_blocks(weight)
        ]
    )


def launched(
    weight: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float, m: mx.array
) -> mx.array:
    """Run the kernel on a dense weight of any size; no gradient is defined."""
    out, width = weight.shape
    inputs = (
        weight,
        lora_a.astype(mx.float32).T,  # MLX copies it, so that columns are neighbors
        scale * lora_b.astype(mx.float32),
        m.astype(mx.float32),
    )
    launch = plan_fused_weight((out, width), lora_a.shape[1], weight.dtype)
    (fused,) = run(_KERNEL, inputs, launch)
    return fused


def job(case: Case) -> Job:
    """Return both sides of a case."""
    out, width, r = case.rows, case.columns, case.rank

    def inputs(seed: int) -> tuple[mx.array, ...]:
        return (
            normal(out, width, seed=seed, dtype=case.dtype),
            normal(width, r, seed=seed + 1),
            normal(r, out, seed=seed + 2),
            normal(out, seed=seed + 3),
        )

    def kernel(w: mx.array, a: mx.array, b: mx.array, m: mx.array) -> mx.array:
        return launched(w, a, b, 0.5, m)

    def by_blocks(w: mx.array, a: mx.array, b: mx.array, m: mx.array) -> mx.array:
        return plain.fused_weight(w, a, b, 0.5, m)

    return Job(inputs=inputs, kernel=kernel, plain=by_blocks)
