"""An adapted weight as a plain one: dense, packed again, or with g in its scales.

Pure functions from a base weight and its adapter to the fused weight, row block by row
block; fusing in memory and fusing a checkpoint tensor by tensor both stand on them.
"""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.kernels.fused_weight import fused_weight
from mlx_dora.matrix.low_rank import Adapted
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.weight import Weight, row_blocks

# Elements of a block; its dozen float32 copies are small next to a large tensor.
_BLOCK = 1 << 16


def dense_fused(weight: Weight, adapted: Adapted, dtype: mx.Dtype) -> mx.array:
    """The adapted weight in `dtype`, rounded once. Shape ``(out, in)``."""
    rows = []
    for index, block in row_blocks(weight, _BLOCK):
        rows.append(_fused_rows(block, adapted, index).astype(dtype))
        mx.eval(rows[-1])
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
    """The adapted weight packed again, scales in the dtype of the base's.

    Rows that the update leaves as they were keep their packed values, where group size,
    bits and mode are those of the base.

    Args:
        weight: The base weight. Shape ``(out, in)``.
        adapted: Its adapter.
        group_size: Columns that share a scale.
        bits: Bits of a packed value.
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
    """Row j times g_j, in the scales and biases alone: no packed value changes.

    Raises:
        DoRAError: If the packing has no scale that could take any number.
    """
    if weight.biases is None:
        raise DoRAError(
            f"{weight.mode} scales are powers of two or 8-bit floats and cannot take a "
            "magnitude; fuse with requantize or dequantize."
        )
    factor = gain[:, None]
    return replace(
        weight,
        scales=(factor * weight.scales.astype(mx.float32)).astype(scales_dtype),
        biases=(factor * weight.biases.astype(mx.float32)).astype(scales_dtype),
    )


def _fused_rows(block: mx.array, adapted: Adapted, index: slice) -> mx.array:
    """The adapted rows `index`, whose base rows are `block`, in float32."""
    update, m = adapted.update, adapted.m
    full = block.astype(mx.float32)
    if m is None:  # LoRA: rows keep their own length
        return full + update.rows(index)
    return fused_weight(
        full,
        update.lora_a,
        update.lora_b[:, index],
        update.scale,
        m[index],
    )
