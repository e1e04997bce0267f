"""The best low-rank part of a matrix that is only read in blocks of rows.

Randomized subspace iteration with oversampling (Halko, Martinsson and Tropp, 2011,
arXiv:0909.4061, algorithms 4.4 and 5.1). No dense copy of the matrix is made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_dora.matrix.weight import row_dot

RowBlocks = Callable[[], Iterator[tuple[slice, mx.array]]]
"""Reads a matrix once: slices of consecutive rows, and the rows ``(n, in)``."""

PASSES = 40
"""Largest number of passes of a search that ends by itself."""

_SPARE = 8  # least number of directions beside the rank
# Share of the last growth to expect from the next pass, before two have been seen.
_RATIO = 0.25


@dataclass(frozen=True, kw_only=True)
class PrincipalPart:
    """The low-rank part of a matrix M: its largest singular values and vectors.

    Attributes:
        outputs: U, orthonormal. Shape ``(out, k)``; k is at most the rank.
        values: Singular values, largest first. Shape ``(k,)``.
        inputs: V, orthonormal. Shape ``(in, k)``.
        energy: ‖M‖², the sum of all squared singular values.
        passes: How often the matrix was read.
        excess: Estimate of how far the squared error is above the least possible, as
            a share of it; after a fixed number of passes, inf.
        basis: Orthonormal inputs among which the directions were sought, to start the
            search in a similar matrix. Shape ``(in, count)``.
        ratio: Growth of the captured energy in the last pass, as a share of the growth
            in the pass before; None after fewer than three passes.
    """

    outputs: np.ndarray
    values: np.ndarray
    inputs: np.ndarray
    energy: float
    passes: int
    excess: float
    basis: np.ndarray
    ratio: float | None

    def factors(self, rank: int) -> tuple[mx.array, mx.array]:
        """Return A = V·√S ``(in, rank)`` and B = √S·Uᵀ ``(rank, out)`` in float32.

        They are zero beyond the number of directions of the matrix.
        """
        root = np.sqrt(self.values)
        lacking = ((0, 0), (0, rank - root.size))
        lora_a = np.pad(self.inputs * root, lacking)
        lora_b = np.pad(self.outputs * root, lacking).T
        return mx.array(lora_a.astype(np.float32)), mx.array(lora_b.astype(np.float32))


def principal_part(
    blocks: RowBlocks,
    shape: tuple[int, int],
    rank: int,
    *,
    tolerance: float | None = 1e-3,
    passes: int = PASSES,
    key: mx.array | None = None,
    near: PrincipalPart | None = None,
) -> PrincipalPart:
    """Return the nearest matrix of a rank, in the Frobenius norm, up to `tolerance`.

    Each pass multiplies the basis by MᵀM, in float32; the last only by M. The energy
    that the basis captures grows with every pass. The search ends when the growth that
    is still to be expected, extrapolated as a geometric series, is below `tolerance` of
    the squared error that remains; or when that error is rounding noise.

    Args:
        blocks: Reads the matrix M of shape ``(out, in)``.
        shape: ``(out, in)``.
        rank: Number of directions to keep.
        tolerance: Share by which the squared error may exceed the least possible. None
            for exactly `passes` passes.
        passes: Largest number of passes of the iteration.
        key: Random key of the first basis; None for MLX's random state.
        near: Part of a similar matrix, whose directions are tried first.
    """
    out, width = shape
    count = min(rank + max(_SPARE, rank // 2), out, width)
    basis = np.array(mx.random.normal((width, count), key=key), np.float64)
    search = _Search(rank=rank, tolerance=tolerance)
    if near is not None:
        shared = min(count, near.basis.shape[1])
        basis[:, :shared] = near.basis[:, :shared]
        search.ratio = near.ratio
    reads = 0
    while True:
        directions = _orthonormal(basis)
        is_last = search.is_last(reads, passes)
        if is_last:
            left, sizes, right, energy = _decomposed(blocks, directions)
            reads += 1
            search.add(np.square(sizes), energy)
            if tolerance is None or reads > passes or search.excess < tolerance:
                break
        basis, values, energy = _iterate(blocks, directions)
        reads += 1
        if not is_last:  # else they are known already
            search.add(values, energy)
    return PrincipalPart(
        outputs=left[:, :rank],
        values=sizes[:rank],
        inputs=right[:, :rank],
        energy=energy,
        passes=reads,
        excess=np.inf if tolerance is None else search.excess,
        basis=directions,
        ratio=search.ratio,
    )


@dataclass(kw_only=True)
class _Search:
    """Decides, from the energies captured so far, whether a search can end.

    Attributes:
        rank: Number of directions to keep.
        tolerance: As in `principal_part`.
        ratio: The last growth of the captured energy over the one before; None if two
            have not been seen.
    """

    rank: int
    tolerance: float | None
    ratio: float | None = None
    _captured: list[float] = field(default_factory=list)
    _energy: float = 0.0

    def add(self, values: np.ndarray, energy: float) -> None:
        """Add a pass: squared singular values of MQ, largest first, and ‖M‖²."""
        self._captured.append(float(values[: self.rank].sum()))
        self._energy = energy
        if len(self._captured) > 2:
            first, second, third = self._captured[-3:]
            growth = max(third - second, 0.0)
            self.ratio = min(growth / (second - first), 0.98) if second > first else 0.0

    @property
    def excess(self) -> float:
        """Growth still to be expected as a share of the rest; inf if unknown."""
        return self._expected(self.ratio, ahead=0)

    def is_last(self, reads: int, passes: int) -> bool:
        """Whether the next pass is expected to end the search."""
        if self.tolerance is None or reads >= passes:
            return reads >= passes
        if len(self._captured) == 1 and self.ratio is not None:
            return True  # a similar matrix was searched before
        ratio = _RATIO if self.ratio is None else self.ratio
        return self._expected(ratio, ahead=1) < self.tolerance

    def _expected(self, ratio: float | None, ahead: int) -> float:
        """The growth expected after `ahead` more passes, as a share of the rest."""
        if not self._captured:
            return np.inf
        rest = self._energy - self._captured[-1]
        if rest <= 1e-12 * self._energy:
            return 0.0
        if len(self._captured) < 2 or ratio is None:
            return np.inf
        growth = max(self._captured[-1] - self._captured[-2], 0.0) * ratio**ahead
        # The ratio rises from pass to pass: what converges quickly comes first. Its
        # root, expected instead, kept the bound in every case of the tests.
        root = ratio**0.5
        return growth * root / (1 - root) / rest


def residual_energy(
    blocks: RowBlocks, lora_a: mx.array, lora_b: mx.array, scale: float = 1.0
) -> float:
    """Return ‖M − s·BA‖², reading M once.

    Args:
        blocks: Reads the matrix M ``(out, in)``.
        lora_a: A, shape ``(in, r)``.
        lora_b: B, shape ``(r, out)``.
        scale: Multiplier s.
    """
    total = 0.0
    for index, block in blocks():
        rest = block.astype(mx.float32) - (scale * lora_b.T[index]) @ lora_a.T
        total += float(mx.square(rest).sum())
    return total


def _iterate(
    blocks: RowBlocks, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return MᵀMQ, the squared singular values of MQ (largest first), and ‖M‖²."""
    q = mx.array(directions.astype(np.float32))
    width, count = directions.shape
    total, gram, energy = mx.zeros((count, width)), np.zeros((count, count)), 0.0
    for _, block in blocks():
        full = block.astype(mx.float32)
        product = full @ q
        total = mx.addmm(total, product.T, full)  # faster than fullᵀ @ product
        mx.eval(full, product, total)
        own = np.array(product, np.float64)
        gram += own.T @ own
        energy += _energy_of(full)
    values = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    return np.array(total, np.float64).T, values, energy


def _energy_of(block: mx.array) -> float:
    """Return the sum of squares of an evaluated float32 block."""
    view = np.array(block, copy=False)
    return float(row_dot(view, view).sum())


def _decomposed(
    blocks: RowBlocks, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return U, σ and V of M restricted to orthonormal directions, and ‖M‖²."""
    q = mx.array(directions.astype(np.float32))
    parts, energy = [], 0.0
    for _, block in blocks():
        full = block.astype(mx.float32)
        product = full @ q
        mx.eval(full, product)
        parts.append(np.array(product, np.float64))
        energy += _energy_of(full)
    left, sizes, mixed = np.linalg.svd(np.concatenate(parts), full_matrices=False)
    return left, sizes, directions @ mixed.T, energy


def _orthonormal(basis: np.ndarray) -> np.ndarray:
    # Powers of MᵀM can leave the range in which QR squares columns.
    largest = np.abs(basis).max(initial=0.0)
    return np.linalg.qr(basis / (largest or 1.0))[0]
