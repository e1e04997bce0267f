r"""Coordinates of the updates of one matrix, in which block methods merge them.

A space writes every update as

.. math:: s_i B_i A_i = L \, C_i \, R^\top

with orthonormal L and R that all adapters share. A method merges the coordinates
:math:`C_i`, small matrices, and :math:`L \, C \, R^\top` is the merged
update: no ``(out, in)`` array is built. L and R need only the factors (float64).

A function gets the updates, and the rank of the result (None for no limit). Its entry
is in `mlx_dora.merge.methods.spaces`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_dora.matrix import Factors

# Singular values of merged coordinates below this share of the largest are rounding
# errors of float64, of directions that no adapter has.
_ROUNDING = 1e-12
# Least fall of the relative error for another step of HOOI, and the most steps, as in
# the authors' code.
_TOLERANCE, _STEPS = 1e-6, 1000


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """The updates of N adapters in one space, float64.

    Attributes:
        left: L, orthonormal. Shape ``(out, k)``.
        parts: C of each adapter. Shape ``(k, l)``.
        right: R, orthonormal. Shape ``(in, l)``; None for the identity, with l = in.
    """

    left: np.ndarray
    parts: list[np.ndarray]
    right: np.ndarray | None = None

    def lifted(self, merged: np.ndarray) -> Factors:
        """Return the update with coordinates `merged`, of their rank (at least 1)."""
        u, sizes, v = np.linalg.svd(merged, full_matrices=False)
        count = max(int((sizes > _ROUNDING * sizes[0]).sum()), 1)
        root = np.sqrt(sizes[:count])
        a = v[:count].T * root
        a = a if self.right is None else self.right @ a
        return Factors(a=a, b=self.left @ (u[:, :count] * root))


def core(updates: Sequence[Factors], rank: int | None = None) -> Coordinates:
    r"""Core space: bases of the stacked factors (arXiv:2509.17786, section 4).

    .. math:: [s_1B_1, \dots, s_NB_N] = U_B \Sigma V^\top, \quad
        [A_1; \dots; A_N] = U \Sigma V_A^\top, \quad C_i = U_B^\top s_iB_iA_i V_A

    Lossless, for any mix of ranks: every update is inside both spans. The scale s is
    part of B.
    """
    left = _basis(np.concatenate([update.b for update in updates], axis=1))
    right = _basis(np.concatenate([update.a for update in updates], axis=1))
    parts = [(left.T @ each.b) @ (right.T @ each.a).T for each in updates]
    return Coordinates(left=left, parts=parts, right=right)


def knots(updates: Sequence[Factors], rank: int | None = None) -> Coordinates:
    r"""KnOTS: the right factors of the updates side by side (arXiv:2410.19735).

    .. math:: [s_1B_1A_1, \dots, s_NB_NA_N] = U \Sigma [V_1, \dots, V_N]^\top, \quad
        C_i = \Sigma V_i^\top

    of shape ``(k, in)``, with R the identity. U comes from the square root of
    :math:`\sum_i s_i^2 B_i (A_iA_i^\top) B_i^\top`, so the updates are not built.
    """
    roots = [each.b @ np.linalg.qr(each.a)[1].T for each in updates]
    left = _basis(np.concatenate(roots, axis=1))
    parts = [(left.T @ each.b) @ each.a.T for each in updates]
    return Coordinates(left=left, parts=parts)


def ctm(updates: Sequence[Factors], rank: int) -> Coordinates:
    r"""Compress then merge: the best subspaces of `rank` for all (arXiv:2606.03723).

    .. math:: \max_{U, V} \sum_i \frac{\lVert U^\top B_iA_i V\rVert_F^2}
        {\lVert B_iA_i\rVert_F^2}, \qquad C_i = U^\top s_iB_iA_i V

    with orthonormal U and V of `rank` columns: the result has that rank, without a cut.
    Every update counts equally in the choice, as in the authors' code (β = 0). The
    maximum is sought in core space by alternating SVDs (HOOI), from HOSVD. Lossy, but a
    single adapter is cut as by Eckart and Young.
    """
    space = core(updates)
    sizes = [np.linalg.norm(part) for part in space.parts]
    units = [c / size for c, size in zip(space.parts, sizes, strict=True) if size > 0]
    if not units or space.right is None:  # no adapter changes anything
        return space
    left, right = (_leading(each, rank) for each in (units, [c.T for c in units]))
    error = 1.0
    for _ in range(_STEPS):
        left = _leading([c @ right for c in units], rank)
        right = _leading([c.T @ left for c in units], rank)
        kept = sum(np.square(left.T @ c @ right).sum() for c in units) / len(units)
        before, error = error, np.sqrt(max(1.0 - float(kept), 0.0))
        if before - error < _TOLERANCE:
            break
    parts = [left.T @ c @ right for c in space.parts]
    return Coordinates(left=space.left @ left, parts=parts, right=space.right @ right)


def _leading(parts: Sequence[np.ndarray], rank: int) -> np.ndarray:
    """The first `rank` left singular vectors of matrices side by side."""
    return _basis(np.concatenate(parts, axis=1))[:, :rank]


def _basis(columns: np.ndarray) -> np.ndarray:
    """Left singular vectors, those of the largest singular values first."""
    return np.linalg.svd(columns, full_matrices=False)[0]
