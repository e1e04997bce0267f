"""Norms of the adapted rows, the denominator of DoRA's Eq. 5."""

import mlx.core as mx

from mlx_dora.kernels import plain
from mlx_dora.kernels.dispatch import (
    KERNELS,
    relative_error,
    run,
    select,
    takes_kernel,
)
from mlx_dora.kernels.plans import (
    plan_adapted_norm,
    plan_adapted_norm_packed,
    plan_adapted_norm_total,
)
from mlx_dora.matrix.low_rank import LowRank
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.weight import Weight, are_ordinary, row_squares

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
    return row_norm(weight, lora_a, lora_b, scale, squared_base=squared_base)


def _pays(
    weight: Weight,
    lora_a: mx.array,
    lora_b: mx.array,
    scale: float,
    *,
    squared_base: mx.array | None = None,
) -> bool:
    if len(weight.shape) > 2 or not _takes(weight, lora_a.shape[1]):
        return False
    # The kernels do not scale values before squaring; given squares are trusted.
    return squared_base is not None or are_ordinary(row_squares(weight))


def _takes(weight: Weight, rank: int) -> bool:
    elements = weight.shape[0] * weight.shape[1]
    if not isinstance(weight, QuantizedWeight):
        return takes_kernel(
            "adapted_norm",
            elements=elements,
            rank=rank,
            dtype=weight.dtype,
            check=lambda: _check(_sample(weight.dtype)),
        )
    if weight.mode != "affine":
        return False
    bits, group_size, dtype = weight.bits, weight.group_size, weight.scales.dtype
    return takes_kernel(
        "adapted_norm_packed",
        elements=elements,
        rank=rank,
        dtype=dtype,
        check=lambda: _check(_pack(_sample(dtype), bits, group_size)),
        variant=f"{bits}-bit, groups of {group_size}",
    )


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


row_norm = select(plain.adapted_norm, launched, _pays)
"""Compute `adapted_norm` without checking shapes, for layers; also for stacks."""


def _sample(dtype: mx.Dtype) -> mx.array:
    return mx.random.normal((19, 384), key=mx.random.key(0)).astype(dtype)


def _pack(weight: mx.array, bits: int, group_size: int) -> QuantizedWeight:
    values, scales, biases = mx.quantize(weight, group_size, bits)
    return QuantizedWeight(
        weight=values, scales=scales, biases=biases, group_size=group_size, bits=bits
    )


def _check(weight: Weight) -> float:
    out, width = weight.shape
    a = mx.random.normal((width, 5), key=mx.random.key(1))
    b = mx.random.normal((5, out), key=mx.random.key(2))
    return relative_error(
        launched(weight, a, b, 0.5), plain.adapted_norm(weight, a, b, 0.5)
    )
