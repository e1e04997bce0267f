"""Singular values of an update, from its factors or from a Gram matrix."""

from dataclasses import dataclass

import numpy as np

# Singular values under this share of the largest are rounding.
_RANK_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Subspaces:
    """An update BᵀAᵀ as U·diag(σ)·Vᵀ, of its numerical rank k.

    Attributes:
        outputs: U, orthonormal. Shape ``(out, k)``.
        values: σ, the largest first. Shape ``(k,)``.
        inputs: V, orthonormal. Shape ``(in, k)``.
    """

    outputs: np.ndarray
    values: np.ndarray
    inputs: np.ndarray


def factored_spectrum(a: np.ndarray, b: np.ndarray) -> Subspaces:
    """Singular vectors of a low-rank update: two QRs and the SVD of a small core.

    Args:
        a: Shape ``(in, r)``, float64.
        b: The scaled up projection, shape ``(out, r)``, float64.
    """
    q_in, r_in = np.linalg.qr(a)
    q_out, r_out = np.linalg.qr(b)
    left, values, right = np.linalg.svd(r_out @ r_in.T, full_matrices=False)
    kept = values > _RANK_TOLERANCE * values.max(initial=0.0)
    return Subspaces(
        outputs=q_out @ left[:, kept],
        values=values[kept],
        inputs=q_in @ right.T[:, kept],
    )


def gram_singular_values(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Singular values of b·aᵀ from the two r×r Grams alone, the largest first.

    Good to about 1e-8 of the largest: what lies below is taken as zero.

    Args:
        a: Shape ``(in, r)``, float64.
        b: Shape ``(out, r)``, float64.
    """
    values, vectors = np.linalg.eigh(a.T @ a)
    root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T  # rootᵀ·root = AᵀA
    energy = np.linalg.eigvalsh(root @ (b.T @ b) @ root.T)[::-1]
    return np.sqrt(np.maximum(energy, 0.0))


def effective_rank(values: np.ndarray) -> float:
    """Exponential of the entropy of the energy over singular directions; 0 of zero."""
    energy = np.square(values)
    if not energy.sum() > 0:
        return 0.0
    share = energy[energy > 0] / energy.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def rank_holding(values: np.ndarray, share: float) -> int:
    """The fewest leading directions that hold this share of the energy; 0 of zero."""
    energy = np.cumsum(np.square(values))
    if not energy.size or not energy[-1] > 0:
        return 0
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12)) + 1)
