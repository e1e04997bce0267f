"""`reference.adapted_norm`, by its kernels where they pay."""

from functools import wraps
from typing import cast

import mlx.core as mx

from mlx_dora.kernels import reference
from mlx_dora.kernels._launch import KERNELS, relative_error, run, takes_kernel
from mlx_dora.kernels._table import plan_adapted_norm, plan_adapted_norm_packed
from mlx_dora.kernels.quantized import QuantizedWeight
from mlx_dora.kernels.rows import Weight, are_ordinary, row_squares

_DENSE = KERNELS["adapted_norm"]
_PACKED = KERNELS["adapted_norm_packed"]


@wraps(reference.adapted_norm)  # documented there
def adapted_norm(
    weight: Weight,
    lora_a: mx.array,
    lora_b: mx.array,
    scale: float,
    *,
    squared_base: mx.array | None = None,
) -> mx.array:
    """Norm of each row of the adapted weight, without building that weight."""
    # The kernels square values as they are; whoever gives the squares vouches for them.
    if not _takes(weight, lora_a.shape[-1]) or (
        squared_base is None and not are_ordinary(row_squares(weight))
    ):
        return reference.adapted_norm(
            weight, lora_a, lora_b, scale, squared_base=squared_base
        )
    reference.check_factors(weight.shape, lora_a, lora_b)
    return mx.stop_gradient(launched(weight, lora_a, lora_b, scale))


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
    bits, group_size = weight.bits, weight.group_size
    return takes_kernel(
        "adapted_norm_packed",
        elements=elements,
        rank=rank,
        dtype=weight.scales.dtype,
        check=lambda: _check(_packed(_sample(weight.scales.dtype), bits, group_size)),
        variant=f"{bits}-bit, groups of {group_size}",
    )


def launched(
    weight: Weight, lora_a: mx.array, lora_b: mx.array, scale: float
) -> mx.array:
    """The kernel's norms, whatever the size; no gradient is defined."""
    out, width = weight.shape
    r = lora_a.shape[1]
    low_rank = (
        lora_a.astype(mx.float32),
        lora_b.astype(mx.float32),
        mx.array([scale], dtype=mx.float32),
    )
    if isinstance(weight, QuantizedWeight):
        launch = plan_adapted_norm_packed(out, r, weight.bits, weight.group_size)
        packed = (weight.weight, weight.scales, cast(mx.array, weight.biases))
        (norm,) = run(_PACKED, (*packed, *low_rank), launch)
    else:
        launch = plan_adapted_norm((out, width), r)
        (norm,) = run(_DENSE, (weight, *low_rank), launch)
    return norm


def _sample(dtype: mx.Dtype) -> mx.array:
    return mx.random.normal((19, 384), key=mx.random.key(0)).astype(dtype)


def _packed(weight: mx.array, bits: int, group_size: int) -> QuantizedWeight:
    values, scales, biases = mx.quantize(weight, group_size, bits)
    return QuantizedWeight(
        weight=values, scales=scales, biases=biases, group_size=group_size, bits=bits
    )


def _check(weight: Weight) -> float:
    out, width = weight.shape
    a = mx.random.normal((width, 5), key=mx.random.key(1))
    b = mx.random.normal((5, out), key=mx.random.key(2))
    return relative_error(
        launched(weight, a, b, 0.5), reference.adapted_norm(weight, a, b, 0.5)
    )
