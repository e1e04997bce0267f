"""One adapted weight as a plain one, and how much of its update that kept.

Pure functions from a base weight and its update to the fused weight, row block by row
block; `mlx_dora.adapters.fuse_stream` walks over a model with them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx

from mlx_dora.adapters.fuse_report import Survival
from mlx_dora.errors import DoRAError
from mlx_dora.factored import AdaptedMatrix, factored_terms
from mlx_dora.io.finite import all_finite
from mlx_dora.kernels import QuantizedWeight, fused_weight, normalize_rows
from mlx_dora.kernels.reference import row_gain
from mlx_dora.kernels.rows import Weight, row_blocks, row_norms

# Elements of a block; its dozen float32 copies are small next to a large tensor.
_BLOCK = 1 << 16
# What MLX packs to in mode affine, smallest first.
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a DoRA or LoRA adapter does to a weight ``(out, in)``.

    Attributes:
        lora_a: A. Shape ``(in, r)``.
        lora_b: B. Shape ``(r, out)``.
        scale: Multiplier s.
        m: Magnitudes. Shape ``(out,)``. None for LoRA: W0 + s·BA, not rescaled.
    """

    lora_a: mx.array
    lora_b: mx.array
    scale: float
    m: mx.array | None

    @classmethod
    def of(cls, matrix: AdaptedMatrix) -> "Update":
        """What an adapter does to one matrix."""
        return cls(**vars(matrix.update), m=matrix.m)

    def rows(self, block: mx.array, index: slice) -> mx.array:
        """The adapted rows `index`, whose base rows are `block`; in its dtype."""
        lora_b = self.lora_b[:, index]
        if self.m is None:
            full = block.astype(mx.float32) + self.delta(index)
            return full.astype(block.dtype)
        return fused_weight(block, self.lora_a, lora_b, self.scale, self.m[index])

    def delta(self, index: slice) -> mx.array:
        """Rows `index` of s·BA in float32. Shape ``(rows, in)``."""
        up = self.scale * self.lora_b[:, index].T.astype(mx.float32)
        return up @ self.lora_a.astype(mx.float32).T

    def gain(self, weight: Weight) -> mx.array:
        """The factor m / ‖W0 + s·BA‖ of each row. Shape ``(out,)``, float32."""
        assert self.m is not None
        terms = factored_terms(weight, self.lora_a, self.lora_b, self.scale)
        return row_gain(self.m, terms.norm)


def _float32_rows(weight: Weight, index: slice) -> mx.array:
    """Some rows, unpacked without a rounding to the dtype of the scales."""
    if not isinstance(weight, QuantizedWeight):
        return weight[index].astype(mx.float32)
    rows = weight.rows(index)
    if rows.biases is not None:
        rows = replace(
            rows,
            scales=rows.scales.astype(mx.float32),
            biases=rows.biases.astype(mx.float32),
        )
    return rows.dequantize().astype(mx.float32)


def why_not_finite(weight: Weight) -> str:
    """What to say of a fused weight with NaN or inf, given its base."""
    if not all(all_finite(block) for _, block in row_blocks(weight)):
        return "the weight of the base holds NaN or inf."
    return (
        "the fused weight is not finite, though base and adapter are: the adapter's "
        f"values are too large for {dtype_of(weight)}."
    ).replace("mlx.core.", "")


def dtype_of(weight: Weight) -> mx.Dtype:
    """The dtype of a weight, unpacked."""
    if isinstance(weight, QuantizedWeight):
        return weight.rows(slice(0, 1)).dequantize().dtype
    return weight.dtype


def unpacked_dtype(weight: Weight, own: mx.Dtype) -> mx.Dtype:
    """The dtype of a weight made dense, in a model of dtype `own`.

    Scales of mode affine are in the model's dtype; those of the others are bytes, and
    MLX unpacks them to bfloat16 whatever the model is in.
    """
    if isinstance(weight, QuantizedWeight) and weight.biases is None:
        return own
    return dtype_of(weight)


def dense_fused(weight: Weight, update: Update, dtype: mx.Dtype) -> mx.array:
    """The adapted weight in `dtype`, rounded once. Shape ``(out, in)``."""
    rows = []
    for index, block in row_blocks(weight, _BLOCK):
        rows.append(update.rows(block.astype(mx.float32), index).astype(dtype))
        mx.eval(rows[-1])
    return rows[0] if len(rows) == 1 else mx.concatenate(rows)


def packed_fused(
    weight: QuantizedWeight, update: Update, *, group_size: int, bits: int, mode: str
) -> QuantizedWeight:
    """The adapted weight packed again, scales in the dtype of the base's.

    Rows that the update leaves as they were keep their packed values, where group size,
    bits and mode are those of the base.
    """
    is_same = (group_size, bits, mode) == (weight.group_size, weight.bits, weight.mode)
    parts: list[list[mx.array]] = []
    for index, block in row_blocks(weight, _BLOCK):
        fused = update.rows(block.astype(mx.float32), index).astype(block.dtype)
        packed = list(mx.quantize(fused, group_size=group_size, bits=bits, mode=mode))
        if is_same:
            changed = (fused != block).any(axis=1, keepdims=True)
            own = weight.rows(index)
            before = (own.weight, own.scales, own.biases)
            packed = [
                mx.where(changed, new, old)
                for new, old in zip(packed, before, strict=False)
                if old is not None
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


def folded(
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


def requantized(
    weight: QuantizedWeight, update: Update, keep: float, own: mx.Dtype
) -> tuple[Weight, Survival, Survival | None]:
    """The adapted weight with the fewest bits at which enough of the update survives.

    Tries the base's own packing, then more bits, then a dense weight in the dtype of
    the base's scales (of the model, `own`, where scales are bytes), then float32.

    Returns:
        The weight, how much of its update it kept, and how much the base's own packing
        would have kept if that was not enough.
    """
    plain = None
    for group_size, bits, mode in _packings(weight):
        packed = packed_fused(
            weight, update, group_size=group_size, bits=bits, mode=mode
        )
        found = survival(weight, packed, update)
        if found.survives(keep):
            return packed, found, plain
        plain = plain or found
        del packed
    dense = dense_fused(weight, update, unpacked_dtype(weight, own))
    found = survival(weight, dense, update)
    if not found.survives(keep):
        dense = dense_fused(weight, update, mx.float32)
        found = survival(weight, dense, update)
    return dense, found, plain


def _packings(weight: QuantizedWeight) -> Iterator[tuple[int, int, str]]:
    """Group size, bits and mode: the base's own first, then more bits."""
    yield weight.group_size, weight.bits, weight.mode
    is_affine = weight.mode == "affine"
    group_size = weight.group_size if is_affine else 32
    if weight.shape[1] % group_size:
        return
    for bits in _AFFINE_BITS:
        if bits > weight.bits or (bits == weight.bits and not is_affine):
            yield group_size, bits, "affine"


def survival(
    before: Weight, after: Weight, update: Update, rest: mx.array | None = None
) -> Survival:
    """How much of the update W' − W0 is in the fused weight.

    Args:
        before: The base weight.
        after: The fused weight.
        update: What was to be fused.
        rest: An up projection ``(r, out)`` of the low-rank part that stays beside the
            fused weight, with A and s of the update.
    """
    found = Survival()
    down = update.lora_a.astype(mx.float32).T
    for index, block in row_blocks(before, _BLOCK):
        # The layer's norms are those of the unpacked rows in their own dtype; what that
        # dtype rounds off belongs to W0 all the same, and grows with the row.
        rounded, base = block.astype(mx.float32), _float32_rows(before, index)
        if update.m is None:
            adapted = base + update.delta(index)
        else:
            m = update.m[index].astype(mx.float32)
            adapted, norm = normalize_rows(rounded + update.delta(index), m)
            adapted = adapted + row_gain(m, norm)[:, None] * (base - rounded)
        fused = _float32_rows(after, index)
        if rest is not None:
            fused = fused + (update.scale * rest[:, index].T) @ down
        found += _survival_of(base, adapted, fused)
    return found


def _survival_of(base: mx.array, adapted: mx.array, fused: mx.array) -> Survival:
    """How much of adapted − base is in fused − base; all float32 ``(rows, in)``."""
    exact, left = adapted - base, fused - base
    length = row_norms(adapted)
    off = row_norms(fused) - length
    # A zero row has no length to be off from.
    off = mx.where(length > 0, off / mx.where(length > 0, length, 1), 0)
    size = float(mx.maximum(mx.abs(exact).max(), mx.abs(left).max()))
    # Squares of the largest and smallest changes are beyond float32, not float64.
    is_extreme = 0 < size < 1e-15 or 1e15 < size < math.inf
    unit = size if is_extreme else 1.0
    exact, left = exact / unit, left / unit
    sums = [exact * exact, exact * left, left * left]
    values = mx.stack([value.sum() for value in (*sums, mx.square(off))]).tolist()
    exact_square, product, kept_square, row_square = cast(list[float], values)
    return Survival(
        exact_square=exact_square * unit**2,
        product=product * unit**2,
        kept_square=kept_square * unit**2,
        row_square=row_square,
        rows=base.shape[0],
    )
