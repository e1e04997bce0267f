"""The DoRA adapter nearest to a tuned matrix, from rows of the base and the tuned one.

The same problem as in `mlx_dora.merge.adapters.factor`, for large matrices: rows are
read in blocks, and the update comes from randomized subspace iteration
(`mlx_dora.matrix.subspace`), so no dense copy and no dense SVD are made.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_dora.matrix.subspace import PrincipalPart, principal_part
from mlx_dora.matrix.weight import Weight, row_blocks
from mlx_dora.merge.adapters.factored import MergedMatrix, single

LARGE = 512
"""Smaller sides are faster by a dense decomposition."""
TOLERANCE = 1e-3
"""How far the squared error may be above the least possible, as a share of it."""
_SHARE = 4  # of the smaller side, directions may be this part at most
_FIRST = 32  # rank of the first try for an energy
_LEANS = 0.1
_SWEEPS = 2
_LEAST, _GREATEST = 1e-12, 1e12  # lengths of rows whose squares float32 holds
_ELEMENTS = 1 << 21


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of both matrices, and their lengths and products, each ``(out,)``."""

    old: Weight
    new: Weight
    base_norm: np.ndarray
    norm: np.ndarray
    along: np.ndarray

    def pairs(self) -> Iterator[tuple[slice, mx.array, mx.array]]:
        """Yield slices, and float32 rows of the base and of the tuned matrix."""
        return _pairs(self.old, self.new)

    def units(self, index: slice, goal: mx.array) -> mx.array:
        """Unit directions of tuned rows; 0 for zero rows."""
        norm = self.norm[index]
        return goal * _column(np.where(norm > 0, 1 / np.where(norm > 0, norm, 1), 0.0))


def nearest(
    old: Weight, new: Weight, *, rank: int | None, energy: float | None
) -> tuple[MergedMatrix, float] | None:
    """Compute the adapter nearest to a tuned matrix, holding blocks of rows.

    Args:
        old: The base. Shape ``(out, in)``.
        new: The tuned matrix, of the same shape.
        rank: Rank of the update; with `energy`, the largest rank.
        energy: Share of the update's squared norm to keep.

    Returns:
        The adapter, and ‖adapted − tuned‖ over ‖tuned − base‖; None if a dense
        decomposition suits better: small matrices, large ranks, extreme values, or no
        change.
    """
    least = min(old.shape)
    if least < LARGE or (rank is not None and rank * 2 > least // _SHARE):
        return None
    rows = _measured(old, new)
    if rows is None:
        return None
    norm, base_norm = rows.norm, rows.base_norm
    target = np.where(rows.along > _LEANS * base_norm, rows.along, base_norm)
    target = np.where(base_norm > 0, target, norm)
    update = _update(rows, target, rank, energy)
    for _ in range(_SWEEPS):
        if update is None:
            return None
        part, gain = update
        best = _fitting(rows, target, part, gain)
        # For this update, the loss falls by exactly so much with the new lengths.
        fall = float(np.square(gain * (best - target)).sum())
        if fall < 0.01 * _lost(part) * part.energy:
            break
        better = _update(rows, best, part.values.size, None)
        if better is None or _lost(better[0]) >= 0.99 * _lost(part):
            break
        target, update = best, better
    if update is None:
        return None
    part, gain = update
    lora_a, up = _factors(part, gain)
    merged = MergedMatrix(
        lora_a=single(lora_a),
        lora_b=single(up.T),
        m=single(norm),
        scale=1.0,
        zero=int((norm == 0).sum()),
        discarded=_lost(part),
    )
    return merged, _error(rows, merged)


def _pairs(old: Weight, new: Weight) -> Iterator[tuple[slice, mx.array, mx.array]]:
    both = zip(row_blocks(old, _ELEMENTS), row_blocks(new, _ELEMENTS), strict=True)
    for (index, start), (_, goal) in both:
        yield index, start.astype(mx.float32), goal.astype(mx.float32)


def _column(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32))[:, None]


def _measured(old: Weight, new: Weight) -> _Rows | None:
    """Measure the rows; None if they are equal, not finite, or of extreme size."""
    parts: list[list[np.ndarray]] = [[], [], []]
    changed = is_lost = False
    for _, start, goal in _pairs(old, new):
        norm = mx.sqrt(mx.square(goal).sum(1))
        unit = goal / mx.where(norm > 0, norm, 1.0)[:, None]
        sums = [mx.sqrt(mx.square(start).sum(1)), norm, (start * unit).sum(1)]
        moved = mx.any(start != goal)
        lost = [  # squares below float32's range
            mx.any((size == 0) & mx.any(block != 0, axis=1))
            for size, block in ((sums[0], start), (norm, goal))
        ]
        mx.eval(sums, moved, lost)
        changed, is_lost = changed or bool(moved), is_lost or any(map(bool, lost))
        for part, values in zip(parts, sums, strict=True):
            part.append(np.array(values, np.float64))
    base_norm, norm, along = (np.concatenate(part) for part in parts)
    sizes = np.concatenate([base_norm, norm])
    sizes = sizes[sizes != 0]
    is_plain = (
        np.isfinite(along).all() and ((sizes > _LEAST) & (sizes < _GREATEST)).all()
    )
    if not changed or is_lost or not is_plain:
        return None
    return _Rows(old=old, new=new, base_norm=base_norm, norm=norm, along=along)


def _update(
    rows: _Rows, target: np.ndarray, rank: int | None, energy: float | None
) -> tuple[PrincipalPart, np.ndarray] | None:
    """The principal part of the weighted change, and the weights of its rows.

    None if more directions are needed than a dense decomposition is good for.
    """
    gain = np.where(target > 0, rows.norm / np.where(target > 0, target, 1.0), 1.0)
    gain = np.maximum(gain, 1e-6 * max(float(gain.max()), 1e-30))
    shape = (rows.old.shape[0], rows.old.shape[1])

    # A row that is 0 in the tuned matrix has no direction: its change counts as 0.
    of_base = np.where(rows.norm > 0, gain, 0.0)
    of_goal = of_base * target / np.where(rows.norm > 0, rows.norm, 1.0)

    def blocks() -> Iterator[tuple[slice, mx.array]]:
        for index, start, goal in rows.pairs():
            yield (
                index,
                goal * _column(of_goal[index]) - start * _column(of_base[index]),
            )

    most = min(shape) // (2 * _SHARE)
    if rank is not None:
        most = min(most, rank)
    count = most if energy is None else min(_FIRST, most)
    while True:
        key = mx.random.key(0)
        part = principal_part(blocks, shape, count, tolerance=TOLERANCE, key=key)
        if energy is None:
            return part, gain
        kept = np.cumsum(np.square(part.values))
        if kept[-1] >= energy * part.energy * (1 - 1e-12) or count == rank:
            enough = int(np.searchsorted(kept, energy * part.energy * (1 - 1e-12)))
            return _first(part, min(enough + 1, kept.size)), gain
        if count == most:
            return None
        count = min(2 * count, most)


def _first(part: PrincipalPart, count: int) -> PrincipalPart:
    """The `count` largest directions of a principal part."""
    return replace(
        part,
        outputs=part.outputs[:, :count],
        values=part.values[:count],
        inputs=part.inputs[:, :count],
    )


def _lost(part: PrincipalPart) -> float:
    """Share of the squared norm beyond the principal part."""
    kept = float(np.square(part.values).sum())
    return max(part.energy - kept, 0.0) / part.energy if part.energy else 0.0


def _factors(part: PrincipalPart, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A ``(in, r)``, and B's transpose ``(out, r)`` for unweighted rows."""
    root = np.sqrt(part.values)
    return part.inputs * root, part.outputs * root / gain[:, None]


def _fitting(
    rows: _Rows, target: np.ndarray, part: PrincipalPart, gain: np.ndarray
) -> np.ndarray:
    """The lengths at which an update fits each direction best."""
    lora_a, up = _factors(part, gain)
    down = mx.array(lora_a.astype(np.float32))
    fitting = rows.along.copy()
    for index, _, goal in rows.pairs():
        left = np.array(rows.units(index, goal) @ down, np.float64)
        fitting[index] += (left * up[index]).sum(1)
    return np.where(fitting > _LEANS * target, fitting, target)


def _error(rows: _Rows, merged: MergedMatrix) -> float:
    """‖adapted − tuned‖ over ‖tuned − base‖."""
    apart = moved = 0.0
    for index, start, goal in rows.pairs():
        adapted = start + merged.lora_b.T[index] @ merged.lora_a.T
        norm = mx.sqrt(mx.square(adapted).sum(1, keepdims=True))
        unit = adapted / mx.where(norm > 0, norm, 1.0)
        rest = merged.m[index][:, None] * unit - goal
        sums = mx.square(rest).sum(), mx.square(goal - start).sum()
        mx.eval(sums)
        apart, moved = apart + float(sums[0]), moved + float(sums[1])
    return float(np.sqrt(apart / moved))
