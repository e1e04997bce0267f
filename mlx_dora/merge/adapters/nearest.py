"""The DoRA adapter nearest to a tuned matrix, from rows of the base and the tuned one.

The same problem as in `mlx_dora.merge.adapters.factor`, for large matrices: rows are
read in blocks, and the update comes from randomized subspace iteration
(`mlx_dora.matrix.subspace`), so no dense copy and no dense SVD are made.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_dora import openblas
from mlx_dora.matrix.subspace import PrincipalPart, principal_part
from mlx_dora.matrix.weight import Weight, row_blocks, row_dot
from mlx_dora.merge.adapters.factored import MergedMatrix, single

LARGE = 512
"""Smaller sides are faster by a dense decomposition."""
TOLERANCE = 1e-3
"""How far the squared error may be above the least possible, as a share of it."""
_SHARE = 4  # of the smaller side, directions may be this part at most
_FIRST = 8  # rank of the first try for an energy
_LEANS = 0.1
_SWEEPS = 2
_LEAST, _GREATEST = 1e-12, 1e12  # lengths of rows whose squares float32 holds
_ELEMENTS = 1 << 19  # of a block of rows, whose float32 copy takes 2 MB


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of both matrices, and their lengths and products, each ``(out,)``.

    Attributes:
        old: The base.
        new: The tuned matrix.
        base_norm: Length of each row of the base.
        norm: Length of each row of the tuned matrix, summed in float64.
        along: Inner product of each row of the base and the tuned row's direction.
        moved: ‖tuned − base‖², a number.
    """

    old: Weight
    new: Weight
    base_norm: np.ndarray
    norm: np.ndarray
    along: np.ndarray
    moved: float


@dataclass(frozen=True, kw_only=True)
class _Change:
    """The weighted change M = e∘tuned − g∘base, whose principal part is the update.

    Attributes:
        rows: Both matrices.
        gain: g: length of the tuned row over the length given to its direction.
        stretch: e: 1 but where the gain was raised to its least value.
    """

    rows: _Rows
    gain: np.ndarray
    stretch: np.ndarray

    def blocks(self) -> Iterator[tuple[slice, mx.array]]:
        """Yield slices, and rows of M in float32."""
        for index, block, _ in self.pairs():
            yield index, block

    def pairs(self) -> Iterator[tuple[slice, mx.array, mx.array]]:
        """Yield slices, rows of M, and rows of e∘tuned."""
        # A row that is 0 in the tuned matrix has no direction: its change counts as 0.
        of_base = np.where(self.rows.norm > 0, self.gain, 0.0)
        is_plain = bool((self.stretch == 1).all())
        for index, start, goal in _pairs(self.rows.old, self.rows.new):
            if not is_plain:
                goal = goal * _column(self.stretch[index])
            yield index, goal - start * _column(of_base[index]), goal


@openblas.one_thread()
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
    change = _change(rows, target)
    part = _principal(change, rank, energy)
    for _ in range(_SWEEPS):
        if part is None:
            return None
        best = _fitting(rows, target, part, change.gain)
        # For this update, the loss falls by exactly so much with the new lengths.
        fall = float(np.square(change.gain * (best - target)).sum())
        if fall < 0.01 * _lost(part) * part.energy:
            break
        refitted = _change(rows, best)
        better = _principal(refitted, part.values.size, None, part)
        if better is None or _lost(better) >= 0.99 * _lost(part):
            break
        target, change, part = best, refitted, better
    if part is None:
        return None
    lora_a, up = _factors(part, change.gain)
    merged = MergedMatrix(
        lora_a=single(lora_a),
        lora_b=single(up.T),
        m=single(norm),
        scale=1.0,
        zero=int((norm == 0).sum()),
        discarded=_lost(part),
    )
    return merged, _error(change, merged)


def _pairs(old: Weight, new: Weight) -> Iterator[tuple[slice, mx.array, mx.array]]:
    both = zip(row_blocks(old, _ELEMENTS), row_blocks(new, _ELEMENTS), strict=True)
    for (index, start), (_, goal) in both:
        yield index, start.astype(mx.float32), goal.astype(mx.float32)


def _column(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32))[:, None]


def _measured(old: Weight, new: Weight) -> _Rows | None:
    """Measure the rows; None if they are equal, not finite, or of extreme size."""
    parts: list[list[np.ndarray]] = [[], [], []]
    moved, changed, is_lost = 0.0, False, False
    for _, start, goal in _pairs(old, new):
        delta = goal - start
        mx.eval(start, goal, delta)
        before, after, apart = (
            np.array(block, copy=False) for block in (start, goal, delta)
        )
        wide = after.astype(np.float64)  # the magnitudes are these norms
        norm = np.sqrt(row_dot(wide, wide))
        base_norm = np.sqrt(row_dot(before, before))
        across = row_dot(before, after)
        parts[0].append(base_norm)
        parts[1].append(norm)
        parts[2].append(np.divide(across, norm, out=across, where=norm > 0))
        square = float(row_dot(apart, apart).sum())
        moved, changed = moved + square, changed or square > 0 or bool(apart.any())
        is_lost = is_lost or any(  # squares below float32's range
            bool(block[size == 0].any())
            for size, block in ((base_norm, before), (norm, after))
        )
    base_norm, norm, along = (np.concatenate(part) for part in parts)
    sizes = np.concatenate([base_norm, norm])
    sizes = sizes[sizes != 0]
    is_plain = (
        np.isfinite(along).all() and ((sizes > _LEAST) & (sizes < _GREATEST)).all()
    )
    if not changed or is_lost or not is_plain:
        return None
    return _Rows(
        old=old, new=new, base_norm=base_norm, norm=norm, along=along, moved=moved
    )


def _change(rows: _Rows, target: np.ndarray) -> _Change:
    """The weighted change if the tuned directions are given the lengths `target`."""
    raw = np.where(target > 0, rows.norm / np.where(target > 0, target, 1.0), 1.0)
    gain = np.maximum(raw, 1e-6 * max(float(raw.max()), 1e-30))
    is_raised = (gain > raw) & (rows.norm > 0)
    stretch = np.where(is_raised, gain / np.where(is_raised, raw, 1.0), 1.0)
    return _Change(rows=rows, gain=gain, stretch=stretch)


def _principal(
    change: _Change,
    rank: int | None,
    energy: float | None,
    near: PrincipalPart | None = None,
) -> PrincipalPart | None:
    """The principal part of the weighted change, of the rank or the share of energy.

    None if more directions are needed than a dense decomposition is good for.
    """
    shape = (change.rows.old.shape[0], change.rows.old.shape[1])
    most = min(shape) // (2 * _SHARE)
    if rank is not None:
        most = min(most, rank)
    count = most if energy is None else min(_FIRST, most)
    while True:
        key = mx.random.key(0)
        near = principal_part(
            change.blocks, shape, count, tolerance=TOLERANCE, key=key, near=near
        )
        if energy is None:
            return near
        kept = np.cumsum(np.square(near.values))
        least = energy * near.energy * (1 - 1e-12)
        if kept[-1] >= least or count == rank:
            enough = int(np.searchsorted(kept, least))
            return _first(near, min(enough + 1, kept.size))
        # No direction beyond these holds more than the last of them.
        within_reach = kept[-1] + (most - count) * near.values[-1] ** 2
        if count == most or (rank is None and within_reach < least):
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
    down = single(lora_a)
    across = np.empty(rows.norm.size)
    for index, block in row_blocks(rows.new, _ELEMENTS):
        left = np.array(block.astype(mx.float32) @ down, np.float64)
        across[index] = (left * up[index]).sum(1)
    norm = np.where(rows.norm > 0, rows.norm, 1.0)
    fitting = rows.along + np.where(rows.norm > 0, across / norm, 0.0)
    return np.where(fitting > _LEANS * target, fitting, target)


def _error(change: _Change, merged: MergedMatrix) -> float:
    r"""‖adapted − tuned‖ over ‖tuned − base‖.

    With :math:`R = M - g \circ BA`, the adapted row has the direction of
    :math:`y - R`, y the row of e∘tuned. With n its length and t = ‖y‖/n, the row's
    error :math:`\lVert t(y - R) - y \rVert^2` is a sum of terms as small as R²: no
    digits are lost, however small the change.
    """
    a = merged.lora_a.T
    left = single(-change.gain[:, None] * np.array(merged.lora_b.T, np.float64))
    total = 0.0
    for index, block, goal in change.pairs():
        rest = mx.addmm(block, left[index], a)
        mx.eval(rest, goal)
        seen, y = np.array(rest, copy=False), np.array(goal, copy=False)
        q, c, square = row_dot(seen, seen), row_dot(y, seen), row_dot(y, y)
        length = np.sqrt(np.maximum(square - 2 * c + q, 0.0))
        lives = (length > 0) & (square > 0)
        # t − 1, without the cancellation of ‖y‖ − n
        beyond = np.where(
            lives,
            (2 * c - q) / np.where(lives, length * (np.sqrt(square) + length), 1.0),
            -1.0,
        )
        t = 1 + beyond
        squares = beyond**2 * square - 2 * t * beyond * c + t**2 * q
        total += float((np.maximum(squares, 0.0) / change.stretch[index] ** 2).sum())
    return float(np.sqrt(total / change.rows.moved))
