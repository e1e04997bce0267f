r"""Merges directions of rows: computes coefficients from inner products.

A merged row is a combination of the rows to merge,
:math:`W'_j = \sum_i \beta_{ij} V_{ij}`. The β depend only on the N×N inner products of
the rows, so the same functions serve dense weights and DoRA adapters, whose inner
products are computed in factored form (`mlx_dora.matrix.row_grams`). See
``docs/merging.md``. Everything is float64.

``gram`` is the Gram matrix of the unit directions, shape ``(rows, N, N)``; ``weights``
has shape ``(rows, N)`` and each row sums to 1.
"""

import numpy as np

from mlx_dora.errors import DoRAError

_KARCHER_STEPS = 100
_KARCHER_TOLERANCE = 3e-8  # below float32 rounding
# Below this angle sin(tθ)/sin θ is t to the last bit.
_SAME_DIRECTION = 1e-9


def slerp(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    r"""Spherical interpolation of two directions; t is the weight of the second.

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
            f"slerp merges two inputs, got {gram.shape[1]}: use karcher or nmean "
            "instead."
        )
    theta = np.arccos(np.clip(gram[:, 0, 1], -1.0, 1.0))[:, None]
    is_same = theta < _SAME_DIRECTION
    safe = np.where(is_same, 1.0, theta)
    return np.where(is_same, weights, np.sin(weights * safe) / np.sin(safe))


def nmean(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    r"""Weighted mean of the directions, :math:`\sum_i w_i u_i`, not yet normalized.

    The mean of N nearly orthogonal unit vectors has length 1/√N.
    """
    return weights


def karcher(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    r"""Weighted Karcher mean on the sphere.

    .. math:: T = \sum_i w_i \frac{\theta_i}{\sin\theta_i}(u_i - \cos\theta_i\,u),
        \qquad u \leftarrow \cos\lVert T\rVert\,u +
        \sin\lVert T\rVert\,T / \lVert T\rVert

    The iteration starts at the normalized mean and ends when T vanishes
    (arXiv:2603.04972; Karcher 1977). u and T stay combinations of the u_i, so each step
    works on N coordinates per row.
    """
    mean = _normalized(nmean(gram, weights), gram)
    for _ in range(_KARCHER_STEPS):
        cosine = np.clip(np.einsum("jik,jk->ji", gram, mean), -1.0, 1.0)
        theta = np.arccos(cosine)
        sine = np.sin(theta)
        safe = np.where(sine > _SAME_DIRECTION, sine, 1.0)
        factor = weights * np.where(sine > _SAME_DIRECTION, theta / safe, 1.0)
        tangent = factor - (factor * cosine).sum(1, keepdims=True) * mean
        length = length_of(tangent, gram)[:, None]
        if length.max(initial=0.0) < _KARCHER_TOLERANCE:
            break
        unit = tangent / np.where(length > 0, length, 1.0)
        mean = _normalized(np.cos(length) * mean + np.sin(length) * unit, gram)
    return mean


def moved_weights(
    magnitude: np.ndarray, base_norm: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    r"""Weights in proportion to how far each input moved each row's magnitude.

    .. math:: w'_{ij} \propto w_{ij} \, \bigl|\, |m_{ij}| - \lVert W_{0j}\rVert \bigr|

    so that a magnitude that only one task has moved survives the merge. A row that no
    input moved keeps `weights`.

    Args:
        magnitude: Magnitudes of the inputs, shape ``(rows, N)``.
        base_norm: Row norms of the base, shape ``(rows,)``.
        weights: Weights before scaling, shape ``(rows, N)``.
    """
    moved = weights * np.abs(np.abs(magnitude) - base_norm[:, None])
    total = moved.sum(1, keepdims=True)
    has_moved = total > 1e-7 * base_norm[:, None]  # ignore float32 rounding
    return np.where(has_moved, moved / np.where(has_moved, total, 1.0), weights)


def heaviest(weights: np.ndarray) -> np.ndarray:
    """1 at each row's largest weight (the first, if equal), 0 elsewhere."""
    return np.eye(weights.shape[1])[weights.argmax(1)]


def length_of(coordinates: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Length of each row's combination of directions. Shape ``(rows,)``."""
    square = np.einsum("ji,jik,jk->j", coordinates, gram, coordinates, optimize=True)
    return np.sqrt(np.maximum(square, 0.0))


def _normalized(coordinates: np.ndarray, gram: np.ndarray) -> np.ndarray:
    length = length_of(coordinates, gram)[:, None]
    return coordinates / np.where(length > 0, length, 1.0)
