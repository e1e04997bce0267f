r"""Merging rows by magnitude and direction: coefficients from inner products alone.

Every method here returns a row that is a combination of the rows it merges,
:math:`W'_j = \sum_i \beta_{ij} V_{ij}`. The β need only the N×N inner products of the
rows, so the same functions serve dense weights and DoRA adapters, whose inner products
are factored (`mlx_dora.matrix.row_grams`); see ``docs/merging.md``. All in float64.

``gram`` is that of the unit directions, shape ``(rows, N, N)``; ``weights`` is
``(rows, N)`` and sums to 1 over the N.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.matrix.grams import gram_norm
from mlx_dora.matrix.terms import cancels
from mlx_dora.merge.names import SUMS

# A mean of directions shorter than this share of its parts has no sure direction.
_VANISHES = 1e-3
_KARCHER_STEPS = 100
_KARCHER_TOLERANCE = 3e-8  # under float32 rounding
# Below this angle sin(tθ)/sin θ is t to the last bit.
_SAME_DIRECTION = 1e-9


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How to merge each row.

    Attributes:
        coefficients: β: the merged row is Σ β_i V_i. Shape ``(rows, N)``.
        length: Length of the merged row. Shape ``(rows,)``.
        opposed: Rows whose directions cancel (or cannot be interpolated): they keep the
            direction of the heaviest input. Shape ``(rows,)``.
        cancelled: Rows of a sum whose length is lost in rounding, to be taken from the
            dense row. Shape ``(rows,)``.
    """

    coefficients: np.ndarray
    length: np.ndarray
    opposed: np.ndarray
    cancelled: np.ndarray


def slerp(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    r"""Spherical interpolation of two directions, t being the second's weight.

    .. math:: \frac{\sin((1-t)\theta)}{\sin\theta} u_1 +
        \frac{\sin(t\theta)}{\sin\theta} u_2

    Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985), row by row.

    Raises:
        DoRAError: If there are more than two inputs.
    """
    if gram.shape[1] == 1:
        return weights
    if gram.shape[1] != 2:
        raise DoRAError(
            f"slerp takes two inputs, got {gram.shape[1]}; karcher and nmean take more."
        )
    theta = np.arccos(np.clip(gram[:, 0, 1], -1.0, 1.0))[:, None]
    is_same = theta < _SAME_DIRECTION
    safe = np.where(is_same, 1.0, theta)
    return np.where(is_same, weights, np.sin(weights * safe) / np.sin(safe))


def nmean(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    r"""Weighted mean of the directions, :math:`\sum_i w_i u_i`, to be renormalised.

    The mean of N nearly orthogonal unit vectors has length 1/√N.
    """
    return weights


def karcher(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    r"""Weighted Karcher mean on the sphere.

    .. math:: T = \sum_i w_i \frac{\theta_i}{\sin\theta_i}(u_i - \cos\theta_i\,u),
        \qquad u \leftarrow \cos\lVert T\rVert\,u +
        \sin\lVert T\rVert\,T / \lVert T\rVert

    until T vanishes, from the normalised mean (arXiv:2603.04972; Karcher 1977). u and T
    stay combinations of the u_i, so the steps are in N coordinates a row.
    """
    mean = _normalised(nmean(gram, weights), gram)
    for _ in range(_KARCHER_STEPS):
        cosine = np.clip(np.einsum("jik,jk->ji", gram, mean), -1.0, 1.0)
        theta = np.arccos(cosine)
        sine = np.sin(theta)
        safe = np.where(sine > _SAME_DIRECTION, sine, 1.0)
        factor = weights * np.where(sine > _SAME_DIRECTION, theta / safe, 1.0)
        tangent = factor - (factor * cosine).sum(1, keepdims=True) * mean
        length = _length(tangent, gram)[:, None]
        if length.max(initial=0.0) < _KARCHER_TOLERANCE:
            break
        unit = tangent / np.where(length > 0, length, 1.0)
        mean = _normalised(np.cos(length) * mean + np.sin(length) * unit, gram)
    return mean


_DIRECTIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "slerp": slerp,
    "karcher": karcher,
    "nmean": nmean,
    "magnitude_weighted": nmean,
}


def moved_weights(
    magnitude: np.ndarray, base_norm: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    r"""Weights by how far each input moved each row's magnitude.

    .. math:: w'_{ij} \propto w_{ij} \, \bigl|\, |m_{ij}| - \lVert W_{0j}\rVert \bigr|

    so that a magnitude only one task has moved survives the merge. A row that nobody
    moved keeps `weights`.

    Args:
        magnitude: Shape ``(rows, N)``.
        base_norm: Shape ``(rows,)``.
        weights: Shape ``(rows, N)``.
    """
    moved = weights * np.abs(np.abs(magnitude) - base_norm[:, None])
    total = moved.sum(1, keepdims=True)
    has_moved = total > 1e-7 * base_norm[:, None]  # float32 rounding is no movement
    return np.where(has_moved, moved / np.where(has_moved, total, 1.0), weights)


def combine(
    method: str,
    inner: np.ndarray,
    magnitude: np.ndarray,
    weights: np.ndarray,
    base_norm: np.ndarray | None = None,
) -> Combination:
    """Merge rows: direction and magnitude apart for means, as a sum for sums.

    For a mean the merged length is the weighted mean of the absolute magnitudes, and a
    negative one turns its direction round. For a sum the weights are used as they are
    (for ``task_arithmetic`` with the base among the inputs).

    Args:
        method: One of `mlx_dora.merge.names`, but for the element-wise.
        inner: ⟨V_i, V_k⟩ of the rows before scaling. Shape ``(rows, N, N)``.
        magnitude: Length each input gives its rows. Shape ``(rows, N)``.
        weights: Shape ``(rows, N)``.
        base_norm: For ``magnitude_weighted``. Shape ``(rows,)``.

    Returns:
        The combination. A row that is zero in an input has no direction there: the
        others share its weight, and its magnitude counts as 0.

    Raises:
        DoRAError: If the method does not take so many inputs, or needs a base.
    """
    norm = gram_norm(inner)
    has_direction = norm > 0
    sign = np.where(magnitude < 0, -1.0, 1.0)
    to_unit = np.where(has_direction, sign / np.where(has_direction, norm, 1.0), 0.0)
    length = np.where(has_direction, np.abs(magnitude), 0.0)
    gram = inner * to_unit[:, :, None] * to_unit[:, None, :]
    if method in SUMS:
        alpha = weights * length
        total = _length(alpha, gram)
        parts = np.square(alpha).sum(1)
        return Combination(
            coefficients=alpha * to_unit,
            length=total,
            opposed=np.zeros(len(alpha), bool),
            cancelled=cancels(np.square(total), parts) & (parts > 0),
        )
    if method == "magnitude_weighted":
        if base_norm is None:
            raise DoRAError("magnitude_weighted needs a base to compare with.")
        weights = moved_weights(magnitude, base_norm, weights)
    shared = np.where(has_direction, weights, 0.0)
    total = shared.sum(1, keepdims=True)
    shared = shared / np.where(total > 0, total, 1.0)
    alpha = _DIRECTIONS[method](gram, shared)
    reach = _length(alpha, gram)
    parts = np.abs(alpha).sum(1)
    opposed = (reach <= _VANISHES * parts) & (total[:, 0] > 0) | ~np.isfinite(reach)
    if opposed.any():
        alpha = np.where(opposed[:, None], heaviest(shared), alpha)
        reach = np.where(opposed, 1.0, reach)
    target = (weights * length).sum(1)
    scale = np.where(reach > 0, target / np.where(reach > 0, reach, 1.0), 0.0)
    return Combination(
        coefficients=scale[:, None] * alpha * to_unit,
        length=np.where(reach > 0, target, 0.0),
        opposed=opposed,
        cancelled=np.zeros(len(alpha), bool),
    )


def heaviest(weights: np.ndarray) -> np.ndarray:
    """1 at each row's largest weight (the first of equals), 0 elsewhere."""
    return np.eye(weights.shape[1])[weights.argmax(1)]


def _length(coordinates: np.ndarray, gram: np.ndarray) -> np.ndarray:
    square = np.einsum("ji,jik,jk->j", coordinates, gram, coordinates, optimize=True)
    return np.sqrt(np.maximum(square, 0.0))


def _normalised(coordinates: np.ndarray, gram: np.ndarray) -> np.ndarray:
    length = _length(coordinates, gram)[:, None]
    return coordinates / np.where(length > 0, length, 1.0)
