"""Norms of the adapted rows, the denominator of DoRA's Eq. 5."""

import mlx.core as mx

from mlx_dora.kernels import plain
from mlx_dora.kernels.case import Case
from mlx_dora.kernels.choice import takes_on_gpu
from mlx_dora.kernels.dispatch import KERNELS, run, select
from mlx_dora.kernels.plans import (
    plan_adapted_norm,
    plan_adapted_norm_packed,
    plan_adapted_norm_total,
)
from mlx_dora.kernels.trial import Job, normal
from mlx_dora.matrix.low_rank import LowRank
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.sharded import ShardedWeight
from mlx_dora.matrix.terms import Terms, floored_norm, terms_of
from mlx_dora.matrix.weight import Weight, are_ordinary, product, row_squares

_DENSE = KERNELS["adapted_norm"]
_PACKED = KERNELS["adapted_norm_packed"]
_TOTAL = KERNELS["adapted_norm_total"]


def adapted_norm(
    weight: Weight,
    lora_a: mx.array,
    lora_b: mx.array,
    scale: float,
    *,
    squared_base: mx.array | None = None,
) -> mx.array:
    r"""Compute the norm of each adapted row without building the adapted weight.

    .. math:: n_j = \lVert W_j + s \, (B A)_j \rVert_2

    This is the denominator of Eq. 5 in DoRA (arXiv:2402.09353). It is a constant in the
    backward pass (section 4.3), so that no gradient flows through it. It is factored as
    in `mlx_dora.matrix.terms`. W·A is computed in the dtype of a dense weight,
    everything else in float32.

    Args:
        weight: Frozen base weight. Shape ``(out, in)``, any float dtype or packed.
        lora_a: Down projection. Shape ``(in, r)``.
        lora_b: Up projection. Shape ``(r, out)``.
        scale: Multiplier of the low-rank update.
        squared_base: ``‖W‖²`` of each row, if known. Shape ``(out,)``, float32. If
            given, the caller guarantees that no square overflows or underflows (norms
            from about 1e-9 to 1e18). Otherwise the norms are accurate for every finite
            input.

    Returns:
        Norms in float32, at least 2⁻¹⁰ of ``(‖W‖² + s²‖BA‖²)^½``, because the factored
        sum is noise below that. Shape ``(out,)``.

    Raises:
        DoRAError: If the shapes do not fit together.
    """
    LowRank(lora_a=lora_a, lora_b=lora_b, scale=scale).check_fits(weight.shape)
    if isinstance(weight, ShardedWeight):
        squared = row_squares(weight) if squared_base is None else squared_base
        return divided_norm(weight, lora_a, lora_b, scale, squared)
    return row_norm(weight, lora_a, lora_b, scale, squared_base=squared_base)


def _takes(
    is_forced: bool,
    weight: Weight,
    lora_a: mx.array,
    lora_b: mx.array,
    scale: float,
    *,
    squared_base: mx.array | None = None,
) -> bool:
    case = _case(weight, lora_a.shape[-1])
    if case is None or not takes_on_gpu(is_forced, case, job):
        return False
    # The kernels do not scale values before squaring; given squares are trusted.
    return squared_base is not None or are_ordinary(row_squares(weight))


def _case(weight: Weight, rank: int) -> Case | None:
    """Return the case of a call; None for a stack, and a packing without a kernel."""
    if len(weight.shape) != 2 or isinstance(weight, ShardedWeight):
        return None
    out, width = weight.shape[0], weight.shape[1]
    if not isinstance(weight, QuantizedWeight):
        return Case("adapted_norm", weight.dtype, out, width, rank)
    if weight.mode != "affine":
        return None
    bits, group_size = weight.bits, weight.group_size
    dtype = weight.scales.dtype
    return Case("adapted_norm", dtype, out, width, rank, bits, group_size)


def launched(
    weight: Weight,
    lora_a: mx.array,
    lora_b: mx.array,
    scale: float,
    *,
    squared_base: mx.array | None = None,
) -> mx.array:
    """Run the kernel for any size; a constant in the backward pass.

    The kernel sums the squares itself, so that `squared_base` is not used.
    """
    assert not isinstance(weight, ShardedWeight)
    out, width = weight.shape
    r = lora_a.shape[1]
    # s is multiplied into B on the device: MLX's CUDA build keeps arrays of up to 8
    # bytes in memory of the host, which every threadgroup would have to read.
    low_rank = (lora_a.astype(mx.float32), scale * lora_b.astype(mx.float32))
    if not isinstance(weight, QuantizedWeight):
        launch = plan_adapted_norm((out, width), r, weight.dtype)
        (partial,) = run(_DENSE, (weight, *low_rank), launch)
    else:
        assert weight.biases is not None
        launch = plan_adapted_norm_packed(
            (out, width), r, weight.bits, weight.group_size
        )
        parts = (weight.weight, weight.scales, weight.biases)
        (partial,) = run(_PACKED, (*parts, *low_rank), launch)
    (norm,) = run(_TOTAL, (partial,), plan_adapted_norm_total(*partial.shape))
    return mx.stop_gradient(norm)


row_norm = select(plain.adapted_norm, launched, _takes)
"""Compute `adapted_norm` without checking shapes, for layers; also for stacks.

The weight must not be divided among processes; see `own_norm`.
"""


def divided_norm(
    weight: ShardedWeight,
    lora_a: mx.array,
    lora_b: mx.array,
    scale: float,
    squared: mx.array,
) -> mx.array:
    """Compute `adapted_norm` of every row of a divided weight, ‖W0‖² being `squared`.

    Of rows, each process computes the norms of its own, and all gather them. Of
    columns, all sum one number per row.
    """
    if not weight.axis:
        own = own_norm(weight, lora_a, lora_b, scale, squared)
        return weight.gathered(own)
    update = LowRank(lora_a=lora_a, lora_b=lora_b, scale=scale)
    inner = weight.summed(own_inner(weight, update))
    return norm_by_columns(update, squared, inner)


def own_norm(
    weight: ShardedWeight,
    lora_a: mx.array,
    lora_b: mx.array,
    scale: float,
    squared: mx.array,
) -> mx.array:
    """Compute `adapted_norm` of the rows that this process holds.

    The arguments are those of the whole weight. Shape ``(out / processes,)``.
    """
    own = weight.own
    return row_norm(
        weight.part, lora_a, lora_b[:, own], scale, squared_base=squared[own]
    )


def own_inner(weight: ShardedWeight, update: LowRank) -> mx.array:
    """Return this process's part of c = ⟨W0, BA⟩ of each row, from its columns."""
    own = update.for_columns(weight.own)
    none = mx.zeros(weight.shape[:1])
    inner = terms_of(none, product(weight.part, own.lora_a), own).c
    return mx.stop_gradient(inner)


def norm_by_columns(update: LowRank, squared: mx.array, inner: mx.array) -> mx.array:
    """Return `adapted_norm` of an update, given ‖W0‖² and the summed `own_inner`."""
    p = update.squared_rows()
    terms = Terms(q0=squared, c=inner, p=p, scale=update.scale)
    return mx.stop_gradient(floored_norm(terms))


def job(case: Case) -> Job:
    """Return both sides of a case; plain MLX is given ‖W‖², as in training."""
    scale = 0.5

    def whole(parts: tuple[mx.array, ...]) -> Weight:
        if not case.bits:
            return parts[0]
        return QuantizedWeight(
            weight=parts[0],
            scales=parts[1],
            biases=parts[2],
            group_size=case.group_size,
            bits=case.bits,
        )

    def inputs(seed: int) -> tuple[mx.array, ...]:
        parts = (normal(case.rows, case.columns, seed=seed, dtype=case.dtype),)
        if case.bits:
            parts = tuple(mx.quantize(parts[0], case.group_size, case.bits))
        lora_a = normal(case.columns, case.rank, seed=seed + 1)
        lora_b = normal(case.rank, case.rows, seed=seed + 2)
        return (lora_a, lora_b, row_squares(whole(parts)), *parts)

    def kernel(a: mx.array, b: mx.array, _: mx.array, *parts: mx.array) -> mx.array:
        return launched(whole(parts), a, b, scale)

    def by_terms(
        a: mx.array, b: mx.array, squared: mx.array, *parts: mx.array
    ) -> mx.array:
        return plain.adapted_norm(whole(parts), a, b, scale, squared_base=squared)

    return Job(inputs=inputs, kernel=kernel, plain=by_terms)
