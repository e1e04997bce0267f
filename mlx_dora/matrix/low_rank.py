"""A low-rank update s·BA, its spectrum, and the magnitude that DoRA adds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.matrix.weight import scaled_to_unit

# Singular values below this share of the largest are rounding noise.
_RANK_TOLERANCE = 1e-6

Array = TypeVar("Array", mx.array, np.ndarray)


def row_inner(a1: Array, b1: Array, a2: Array, b2: Array) -> Array:
    r"""Return the inner product of each row of two updates, using AᵀA.

    .. math:: \langle B_1 A_1, B_2 A_2 \rangle_j = B_{1j}^\top (A_1^\top A_2) B_{2j}

    Section 3 of "Scaling DoRA" (arXiv:2603.22276): only ``(out, r)`` and ``(r, r)``
    arrays are built. Ranks above the width use the dense rows, which are smaller.

    Args:
        a1: A1. Shape ``(..., in, r1)``.
        b1: B1ᵀ. Shape ``(..., out, r1)``.
        a2: A2. Shape ``(..., in, r2)``.
        b2: B2ᵀ. Shape ``(..., out, r2)``.

    Returns:
        Inner products, shape ``(..., out)``.
    """
    inner: Any
    if min(a1.shape[-1], a2.shape[-1]) > a1.shape[-2]:
        inner = ((b1 @ a1.swapaxes(-1, -2)) * (b2 @ a2.swapaxes(-1, -2))).sum(-1)
    else:
        gram = a1.swapaxes(-1, -2) @ a2
        inner = ((b1 @ gram) * b2).sum(-1)
    return inner


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A low-rank update s·BA of a matrix ``(out, in)`` or of each matrix in a stack.

    Attributes:
        lora_a: Down projection. Shape ``(..., in, r)``; r may be 0.
        lora_b: Up projection. Shape ``(..., r, out)``.
        scale: Multiplier s.
    """

    lora_a: mx.array
    lora_b: mx.array
    scale: float

    @property
    def rank(self) -> int:
        """Rank r of the factors."""
        return self.lora_a.shape[-1]

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """Check that the factors fit a weight of shape ``(..., out, in)``.

        Raises:
            DoRAError: If they do not fit.
        """
        *stack, out, width = shape
        a, b = self.lora_a.shape, self.lora_b.shape
        if (*a[:-1], *b[-1:]) != (*stack, width, out) or b[:-1] != (*stack, *a[-1:]):
            raise DoRAError(
                f"lora_a {a} and lora_b {b} do not fit a weight of shape "
                f"{tuple(shape)}; expected {_named(stack, width, 'r')} and "
                f"{_named(stack, 'r', out)}."
            )

    def matrices(self) -> list["LowRank"]:
        """Return the update of each matrix in a stack, or this update for a matrix."""
        if self.lora_a.ndim == 2:
            return [self]
        factors = zip(self.lora_a, self.lora_b, strict=True)
        return [replace(self, lora_a=a, lora_b=b) for a, b in factors]

    def for_rows(self, index: slice) -> "LowRank":
        """Return the update of some output rows."""
        return replace(self, lora_b=self.lora_b[..., index])

    def for_columns(self, index: slice) -> "LowRank":
        """Return the update of some columns of the weight."""
        return replace(self, lora_a=self.lora_a[..., index, :])

    def with_unit_columns(self) -> "LowRank":
        """Return this update in float32, with columns of A scaled near 1.

        The squares of such columns neither overflow nor underflow.
        """
        a, powers = scaled_to_unit(self.lora_a.astype(mx.float32), axis=-2)
        b = self.lora_b.astype(mx.float32) * powers.swapaxes(-1, -2)
        return replace(self, lora_a=a, lora_b=b)

    def squared_rows(self) -> mx.array:
        """Return ‖BA‖² of each row, without s. Shape ``(..., out)``, float32.

        This is `row_inner` of the update with itself, in the layout that B is stored
        in: on a CPU, twice as fast as with Bᵀ.
        """
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        if a.shape[-1] > a.shape[-2]:
            return mx.square(a @ b).sum(-2)
        return ((a.swapaxes(-1, -2) @ a @ b) * b).sum(-2)

    def rows(self, index: slice | mx.array) -> mx.array:
        """Return dense rows of s·BA in float32. Shape ``(len(index), in)``."""
        b = self.lora_b.astype(mx.float32).T[index]
        return (self.scale * b) @ self.lora_a.astype(mx.float32).T

    def added_to(self, rows: mx.array, index: slice | mx.array) -> mx.array:
        """Return `rows` + `self.rows(index)` in float32, in one product."""
        b = self.lora_b.astype(mx.float32).T[index]
        return mx.addmm(rows, self.scale * b, self.lora_a.astype(mx.float32).T)

    def float64(self) -> "Factors":
        """Return the factors in float64, with s multiplied into B."""
        a = np.array(self.lora_a.astype(mx.float32), np.float64)
        b = np.array(self.lora_b.astype(mx.float32), np.float64)
        return Factors(a=a, b=self.scale * b.T)


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """The adapter of a matrix, or of each matrix in a stack.

    Attributes:
        update: The low-rank update.
        m: Magnitudes, shape ``(..., out)``; None for LoRA, which has none.
    """

    update: LowRank
    m: mx.array | None

    def matrices(self) -> list["Adapted"]:
        """Return the adapter of each matrix in a stack, or this one for a matrix."""
        if self.update.lora_a.ndim == 2:
            return [self]
        updates = self.update.matrices()
        magnitudes = [None] * len(updates) if self.m is None else list(self.m)
        pairs = zip(updates, magnitudes, strict=True)
        return [Adapted(update=update, m=m) for update, m in pairs]


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """An update as U·diag(σ)·Vᵀ, with numerical rank k.

    Attributes:
        outputs: U, orthonormal. Shape ``(out, k)``.
        values: σ, largest first. Shape ``(k,)``.
        inputs: V, orthonormal. Shape ``(in, k)``.
    """

    outputs: np.ndarray
    values: np.ndarray
    inputs: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Factors:
    """An update b·aᵀ in float64, for analysis and merging.

    Attributes:
        a: A. Shape ``(in, r)``.
        b: s·Bᵀ. Shape ``(out, r)``.
    """

    a: np.ndarray
    b: np.ndarray

    def inner(self, other: "Factors") -> np.ndarray:
        """Return the inner product of each row with `other`'s. Shape ``(out,)``."""
        return row_inner(self.a, self.b, other.a, other.b)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Return dense rows of the update. Shape ``(len(index), in)``."""
        return self.b[index] @ self.a.T

    def spectrum(self) -> Spectrum:
        """Return singular values and vectors above rounding noise."""
        outputs, values, inputs = self._svd()
        kept = values > _RANK_TOLERANCE * values.max(initial=0.0)
        return Spectrum(
            outputs=outputs[:, kept], values=values[kept], inputs=inputs[:, kept]
        )

    def cut(self, rank: int, row_weight: np.ndarray) -> tuple["Factors", float]:
        """Return the best update of a smaller rank (Eckart and Young, 1936).

        It minimizes the Frobenius error of D·BA, where D holds the row weights.

        Args:
            rank: The rank to keep.
            row_weight: Positive weight of each row. Shape ``(out,)``.

        Returns:
            Factors of that rank, and the lost share of the squared norm.
        """
        weighted = Factors(a=self.a, b=self.b * row_weight[:, None])
        outputs, values, inputs = weighted._svd()
        total = float(np.square(values).sum())
        lost = float(np.square(values[rank:]).sum())
        root = np.sqrt(values[:rank])
        cut = Factors(
            a=inputs[:, :rank] * root,
            b=outputs[:, :rank] * root / row_weight[:, None],
        )
        return cut, lost / total if total else 0.0

    def _svd(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return U, σ and V of the update: QR of both factors, then SVD of the core."""
        q_in, r_in = np.linalg.qr(self.a)
        q_out, r_out = np.linalg.qr(self.b)
        left, values, right = np.linalg.svd(r_out @ r_in.T, full_matrices=False)
        return q_out @ left, values, q_in @ right.T

    def singular_values(self) -> np.ndarray:
        """Return singular values, largest first, from the two r×r Gram matrices.

        They are accurate to about 1e-8 of the largest value; smaller values are lost.
        """
        values, vectors = np.linalg.eigh(self.a.T @ self.a)
        root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T  # rootᵀroot = AᵀA
        energy = np.linalg.eigvalsh(root @ (self.b.T @ self.b) @ root.T)[::-1]
        return np.sqrt(np.maximum(energy, 0.0))


def side_by_side(updates: Sequence[Factors]) -> Factors:
    """Return the sum of several updates as one update; equal A factors are shared."""
    all_a: list[np.ndarray] = []
    all_b: list[np.ndarray] = []
    for update in updates:
        for known, a in enumerate(all_a):
            if a.shape == update.a.shape and np.array_equal(a, update.a):
                all_b[known] = all_b[known] + update.b
                break
        else:
            all_a.append(update.a)
            all_b.append(update.b)
    return Factors(a=np.concatenate(all_a, axis=1), b=np.concatenate(all_b, axis=1))


def _named(stack: Sequence[int], *axes: int | str) -> str:
    return f"({', '.join(str(axis) for axis in (*stack, *axes))})"
