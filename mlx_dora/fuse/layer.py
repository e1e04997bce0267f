"""Fuses an adapted weight, and measures how much of its update is kept.

`mlx_dora.fuse.stream` applies these functions to a model.
"""

import math
from collections.abc import Iterator
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_dora.fuse.report import Survival
from mlx_dora.io.finite import all_finite
from mlx_dora.kernels import normalize_rows
from mlx_dora.kernels.fusing import dense_fused, packed_fused
from mlx_dora.matrix.low_rank import Adapted
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.terms import row_gain
from mlx_dora.matrix.weight import (
    Weight,
    dense_dtype,
    exact_float32_rows,
    row_blocks,
    row_dot,
    row_norms,
    unpacked_dtype,
)

# Elements of a block. Its dozen float32 copies are small compared to a large tensor.
_BLOCK = 1 << 16
# Between these, float32 squares of the rows' changes and lengths are exact.
_LEAST, _GREATEST = 1e-30, 1e30
# Bits supported by MLX in mode affine, smallest first.
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)


def measured_fused(
    weight: mx.array, adapted: Adapted, dtype: mx.Dtype
) -> tuple[mx.array, Survival]:
    """Fuse a dense weight, and measure on the way how much of its update is kept."""
    total = Survival()

    def measure(base: mx.array, full: mx.array, fused: mx.array) -> None:
        nonlocal total
        total += _survival_of(base, full, fused)

    return dense_fused(weight, adapted, dtype, measure), total


def why_not_finite(weight: Weight) -> str:
    """Explain why a fused weight holds NaN or inf, given its base."""
    if not all(all_finite(block) for _, block in row_blocks(weight)):
        return "the weight of the base holds NaN or inf."
    return (
        "the fused weight is not finite, though base and adapter are: the adapter's "
        f"values are too large for {dense_dtype(weight)}."
    ).replace("mlx.core.", "")


def requantized(
    weight: QuantizedWeight, adapted: Adapted, keep: float, own: mx.Dtype
) -> tuple[Weight, Survival, Survival | None]:
    """Pack an adapted weight with the fewest bits at which its update survives.

    This tries the base's own packing, then more bits, then a dense weight in the dtype
    of the base's scales (or in the model's dtype `own`, if scales are bytes), then
    float32.

    Returns:
        The weight, the survival of its update, and the survival with the base's own
        packing if that was not enough, else None.
    """
    plain = None
    for group_size, bits, mode in _packings(weight):
        packed = packed_fused(
            weight, adapted, group_size=group_size, bits=bits, mode=mode
        )
        kept = survival(weight, packed, adapted)
        if kept.survives(keep):
            return packed, kept, plain
        plain = plain or kept
        del packed
    dense = dense_fused(weight, adapted, unpacked_dtype(weight, own))
    kept = survival(weight, dense, adapted)
    if not kept.survives(keep):
        dense = dense_fused(weight, adapted, mx.float32)
        kept = survival(weight, dense, adapted)
    return dense, kept, plain


def _packings(weight: QuantizedWeight) -> Iterator[tuple[int, int, str]]:
    """Yield group size, bits and mode: the base's own first, then more bits."""
    yield weight.group_size, weight.bits, weight.mode
    is_affine = weight.mode == "affine"
    group_size = weight.group_size if is_affine else 32
    if weight.shape[1] % group_size:
        return
    for bits in _AFFINE_BITS:
        if bits > weight.bits or (bits == weight.bits and not is_affine):
            yield group_size, bits, "affine"


def survival(
    before: Weight, after: Weight, adapted: Adapted, rest: mx.array | None = None
) -> Survival:
    """Measure how much of the update W' − W0 is in the fused weight.

    Args:
        before: The base weight.
        after: The fused weight.
        adapted: The DoRA or LoRA adapter that was fused.
        rest: Up projection, shape ``(r, out)``, of a low-rank part that is kept in
            addition to the fused weight, with A and s of the update; or None.
    """
    total = Survival()
    update = adapted.update
    a = update.lora_a.astype(mx.float32).T
    for index, block in row_blocks(before, _BLOCK):
        # The layer computes norms from unpacked rows rounded to their dtype. The
        # rounded-off part still belongs to W0 and is scaled with its row.
        rounded, base = block.astype(mx.float32), exact_float32_rows(before, index)
        if adapted.m is None:
            full = base + update.rows(index)
        else:
            m = adapted.m[index].astype(mx.float32)
            full, norm = normalize_rows(rounded + update.rows(index), m)
            full = full + row_gain(m, norm)[:, None] * (base - rounded)
        fused = exact_float32_rows(after, index)
        if rest is not None:
            fused = fused + (update.scale * rest[:, index].T) @ a
        total += _survival_of(base, full, fused)
    return total


def _survival_of(base: mx.array, adapted: mx.array, fused: mx.array) -> Survival:
    """Compare fused − base with adapted − base; all float32 ``(rows, in)``."""
    exact, left = adapted - base, fused - base
    mx.eval(exact, left, adapted, fused)
    due, done, before, after = (
        np.array(values, copy=False) for values in (exact, left, adapted, fused)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        squares = [row_dot(values, values) for values in (due, done, before, after)]
        product = row_dot(due, done).sum()
    # Of changes only the largest counts; of lengths, each is divided by.
    smallest = min(*(v.max() for v in squares[:2]), *(v.min() for v in squares[2:]))
    if not (smallest > _LEAST and max(v.max() for v in squares) < _GREATEST):
        return _extreme_survival(base, adapted, fused)
    length, now = np.sqrt(squares[2]), np.sqrt(squares[3])
    return Survival(
        exact_square=float(squares[0].sum()),
        product=float(product),
        kept_square=float(squares[1].sum()),
        row_square=float(np.square(now / length - 1).sum()),
        rows=base.shape[0],
    )


def _extreme_survival(base: mx.array, adapted: mx.array, fused: mx.array) -> Survival:
    """Return `_survival_of` for any finite values, and for NaN and inf."""
    exact, left = adapted - base, fused - base
    length = row_norms(adapted)
    off = row_norms(fused) - length
    # A zero row has no relative length error.
    off = mx.where(length > 0, off / mx.where(length > 0, length, 1), 0)
    size = float(mx.maximum(mx.abs(exact).max(), mx.abs(left).max()))
    # Squares of very large or small changes exceed float32, but not float64.
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
