"""`reference.fused_weight`, by its kernel where one pays."""

from functools import wraps

import mlx.core as mx

from mlx_dora.kernels import reference
from mlx_dora.kernels._launch import KERNELS, relative_error, run, takes_kernel
from mlx_dora.kernels._table import plan_fused_weight
from mlx_dora.kernels.quantized import QuantizedWeight
from mlx_dora.kernels.rows import Weight, row_blocks

_KERNEL = KERNELS["fused_weight"]


@wraps(reference.fused_weight)  # documented there
def fused_weight(
    weight: Weight, lora_a: mx.array, lora_b: mx.array, scale: float, m: mx.array
) -> mx.array:
    """The adapted weight itself, for fuse and export."""
    is_packed = isinstance(weight, QuantizedWeight)
    if (is_packed and weight.mode != "affine") or not takes_kernel(
        "fused_weight",
        elements=weight.shape[0] * weight.shape[1],
        rank=lora_a.shape[-1],
        dtype=(dtype := weight.scales.dtype if is_packed else weight.dtype),
        check=lambda: _check(dtype),
    ):
        return reference.fused_weight(weight, lora_a, lora_b, scale, m)
    reference.check_factors(weight.shape, lora_a, lora_b)
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
    """The kernel's weight from a dense one, whatever the size; no gradient."""
    out, width = weight.shape
    inputs = (
        weight,
        lora_a.astype(mx.float32),
        lora_b.astype(mx.float32),
        mx.array([scale], dtype=mx.float32),
        m.astype(mx.float32),
    )
    launch = plan_fused_weight((out, width), lora_a.shape[1], weight.dtype)
    (fused,) = run(_KERNEL, inputs, launch)
    return fused


def _check(dtype: mx.Dtype) -> float:
    weight = mx.random.normal((9, 301), key=mx.random.key(0)).astype(dtype)
    a = mx.random.normal((301, 5), key=mx.random.key(1))
    b = mx.random.normal((5, 9), key=mx.random.key(2))
    m = mx.arange(9, dtype=mx.float32)
    return relative_error(
        launched(weight, a, b, 0.5, m), reference.fused_weight(weight, a, b, 0.5, m)
    )
