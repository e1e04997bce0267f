"""The best low-rank part of a matrix that is only read in blocks of rows.

Randomized subspace iteration with oversampling (Halko, Martinsson and Tropp, 2011,
arXiv:0909.4061, algorithms 4.4 and 5.1). No dense copy of the matrix is made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

RowBlocks = Callable[[], Iterator[tuple[slice, mx.array]]]
"""Reads a matrix once: slices of consecutive rows, and the rows ``(n, in)``."""

PASSES = 40
"""Largest number of passes of a search that ends by itself."""

_SPARE = 8  # least number of directions beside the rank


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
    """

    outputs: np.ndarray
    values: np.ndarray
    inputs: np.ndarray
    energy: float
    passes: int
    excess: float

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
) -> PrincipalPart:
    """Return the nearest matrix of a rank, in the Frobenius norm, up to `tolerance`.

    Each pass multiplies the basis by MᵀM, in float32. The energy that the basis
    captures grows with every pass. The search ends when the growth that is still to be
    expected, extrapolated as a geometric series, is below `tolerance` of the squared
    error that remains; or when that error is rounding noise.

    Args:
        blocks: Reads the matrix M of shape ``(out, in)``.
        shape: ``(out, in)``.
        rank: Number of directions to keep.
        tolerance: Share by which the squared error may exceed the least possible. None
            for exactly `passes` passes.
        passes: Largest number of passes of the iteration.
        key: Random key of the first basis; None for MLX's random state.
    """
    out, width = shape
    count = min(rank + max(_SPARE, rank // 2), out, width)
    basis = np.array(mx.random.normal((width, count), key=key), np.float64)
    captured, growth, excess, done = 0.0, 0.0, np.inf, 0
    for done in range(1, passes + 1):
        directions = _orthonormal(basis)
        basis, values, energy = _iterate(blocks, directions)
        now = float(values[:rank].sum())
        growth, before, captured = now - captured, growth, now
        if tolerance is None:
            continue
        rest = energy - captured
        if rest <= 1e-12 * energy:
            excess = 0.0
            break
        if done > 2:
            ratio = min(max(growth, 0.0) / before, 0.98) if before > 0 else 0.0
            excess = max(growth, 0.0) * ratio / (1 - ratio) / rest
            if excess < tolerance:
                break
    left, sizes, right, energy = _decomposed(blocks, _orthonormal(basis))
    return PrincipalPart(
        outputs=left[:, :rank],
        values=sizes[:rank],
        inputs=right[:, :rank],
        energy=energy,
        passes=done + 1,
        excess=float(excess),
    )


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
    total, gram, energy = mx.zeros((width, count)), np.zeros((count, count)), 0.0
    for _, block in blocks():
        full = block.astype(mx.float32)
        product = full @ q
        total = total + full.T @ product
        squares = mx.square(full).sum()
        mx.eval(total, product, squares)
        own = np.array(product, np.float64)
        gram += own.T @ own
        energy += float(squares)
    values = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    return np.array(total, np.float64), values, energy


def _decomposed(
    blocks: RowBlocks, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return U, σ and V of M restricted to orthonormal directions, and ‖M‖²."""
    q = mx.array(directions.astype(np.float32))
    parts, energy = [], 0.0
    for _, block in blocks():
        full = block.astype(mx.float32)
        product, squares = full @ q, mx.square(full).sum()
        mx.eval(product, squares)
        parts.append(np.array(product, np.float64))
        energy += float(squares)
    left, sizes, mixed = np.linalg.svd(np.concatenate(parts), full_matrices=False)
    return left, sizes, directions @ mixed.T, energy


def _orthonormal(basis: np.ndarray) -> np.ndarray:
    # Powers of MᵀM can leave the range in which QR squares columns.
    largest = np.abs(basis).max(initial=0.0)
    return np.linalg.qr(basis / (largest or 1.0))[0]
