"""Fuses an adapted weight: dense, repacked, or with g multiplied into its scales.

These are pure functions from a base weight and its adapter to the fused weight, one
block of rows at a time. Fusing in memory and fusing a checkpoint both use them.
"""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from mlx_dora import openblas
from mlx_dora.errors import DoRAError
from mlx_dora.kernels.fused_weight import fused_weight
from mlx_dora.matrix.low_rank import Adapted
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.weight import Weight, row_blocks

# Elements of a block. Its dozen float32 copies are small compared to a large tensor.
_BLOCK = 1 << 18

Seen = Callable[[mx.array, mx.array, mx.array], None]
"""Called with rows of the base, and of the adapted weight before and after rounding."""


@openblas.one_thread()
def dense_fused(
    weight: Weight, adapted: Adapted, dtype: mx.Dtype, seen: Seen | None = None
) -> mx.array:
    """Return the adapted weight in `dtype`, rounded once. Shape ``(out, in)``.

    Args:
        weight: The base weight. Shape ``(out, in)``.
        adapted: The adapter of this weight.
        dtype: Dtype of the result.
        seen: Called with each block of rows, all evaluated and in float32.
    """
    rows = []
    for index, block in row_blocks(weight, _BLOCK):
        full = block.astype(mx.float32)
        fused = _fused_rows(full, adapted, index)
        rows.append(fused.astype(dtype))
        if seen is None:
            mx.eval(rows[-1])
        else:
            rounded = rows[-1].astype(mx.float32)
            mx.eval(rows[-1], full, fused, rounded)
            seen(full, fused, rounded)
    return rows[0] if len(rows) == 1 else mx.concatenate(rows)


def packed_fused(
    weight: QuantizedWeight,
    adapted: Adapted,
    *,
    group_size: int,
    bits: int,
    mode: str,
    check: Callable[[mx.array], None] = lambda _rows: None,
) -> QuantizedWeight:
    """Repack the adapted weight, with scales in the dtype of the base's scales.

    Rows that the update does not change keep their packed values if group size, bits
    and mode equal those of the base.

    Args:
        weight: The base weight. Shape ``(out, in)``.
        adapted: The adapter of this weight.
        group_size: Number of columns that share a scale.
        bits: Bits per packed value.
        mode: ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``.
        check: Called with each block of adapted rows before it is packed.
    """
    form = {"group_size": group_size, "bits": bits, "mode": mode}
    parts: list[list[mx.array]] = []
    for index, block in row_blocks(weight, _BLOCK):
        fused = _fused_rows(block, adapted, index).astype(block.dtype)
        check(fused)
        packed = list(mx.quantize(fused, group_size=group_size, bits=bits, mode=mode))
        if form == weight.form:
            changed = (fused != block).any(axis=1, keepdims=True)
            before = weight.rows(index).parts.values()
            packed = [
                mx.where(changed, new, old)
                for new, old in zip(packed, before, strict=True)
            ]
        mx.eval(packed)
        parts.append(packed)
    joined = [mx.concatenate(list(part)) for part in zip(*parts, strict=True)]
    return QuantizedWeight(
        weight=joined[0],
        scales=joined[1],
        biases=joined[2] if len(joined) > 2 else None,
        group_size=group_size,
        bits=bits,
        mode=mode,
    )


def scaled_packing(
    weight: QuantizedWeight, gain: mx.array, scales_dtype: mx.Dtype
) -> QuantizedWeight:
    """Multiply row j by g_j in scales and biases, without changing packed values.

    Raises:
        DoRAError: If scales of this packing cannot hold arbitrary numbers.
    """
    if weight.biases is None:
        raise DoRAError(
            f"{weight.mode} scales are powers of two or 8-bit floats and cannot hold a "
            "magnitude; fuse with requantize or dequantize."
        )
    factor = gain[:, None]
    return replace(
        weight,
        scales=(factor * weight.scales.astype(mx.float32)).astype(scales_dtype),
        biases=(factor * weight.biases.astype(mx.float32)).astype(scales_dtype),
    )


def _fused_rows(block: mx.array, adapted: Adapted, index: slice) -> mx.array:
    """Return the adapted rows `index` in float32; their base rows are `block`."""
    update, m = adapted.update, adapted.m
    full = block.astype(mx.float32)
    if m is None:  # LoRA has no magnitudes
        return full + update.rows(index)
    return fused_weight(
        full,
        update.lora_a,
        update.lora_b[:, index],
        update.scale,
        m[index],
    )
