r"""Row methods: each returns a combination of the input rows.

The combination is :math:`W'_j = \sum_i \beta_{ij} V_{ij}`, with coefficients that
depend on the inner products of the rows, their lengths and the weights. So the same
functions serve dense weights and adapters, which are closed under these methods and
whose inner products have a factored form (`mlx_dora.matrix.row_grams`). See
``docs/merging.md``. Everything is float64.

A direction function gets the Gram matrices of the unit directions, shape
``(rows, N, N)``, and weights ``(rows, N)`` that sum to 1 in each row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mlx_dora.matrix.grams import gram_norm
from mlx_dora.matrix.terms import cancels

# A mean of directions shorter than this share of its parts has no reliable direction.
_VANISHES = 1e-3
# Cosine above which mergekit's slerp interpolates linearly.
_COLLINEAR = 0.9995
# Squared sine below which mergekit's nuslerp treats rows as parallel.
_PARALLEL = 1e-16
# Below this the denominator of Model Stock counts as 0, as in mergekit.
_SINGULAR = 1e-6
# Below this angle sin(tθ)/sin θ is t to the last bit.
_SAME_DIRECTION = 1e-9
_KARCHER_STEPS = 100
_KARCHER_TOLERANCE = 3e-8  # below float32 rounding


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The N input rows of each output row, as a method sees them.

    Attributes:
        inner: Inner products ⟨V_i, V_k⟩ of the rows before scaling, shape
            ``(rows, N, N)``.
        magnitude: Length that each input gives its row, shape ``(rows, N)``; a negative
            magnitude reverses the direction.
        weights: Weights, shape ``(rows, N)``; for a mean each row sums to 1.
        base_norm: Length of the base's row, shape ``(rows,)``; None without a base.
    """

    inner: np.ndarray
    magnitude: np.ndarray
    weights: np.ndarray
    base_norm: np.ndarray | None = None

    @cached_property
    def norm(self) -> np.ndarray:
        """Lengths before scaling. Shape ``(rows, N)``."""
        return gram_norm(self.inner)

    @cached_property
    def to_unit(self) -> np.ndarray:
        """Factors that scale the rows to unit directions; 0 for zero rows."""
        sign = np.where(self.magnitude < 0, -1.0, 1.0)
        safe = np.where(self.norm > 0, self.norm, 1.0)
        return np.where(self.norm > 0, sign / safe, 0.0)

    @cached_property
    def length(self) -> np.ndarray:
        """Lengths after scaling; 0 for zero rows."""
        return np.where(self.norm > 0, np.abs(self.magnitude), 0.0)

    @cached_property
    def gram(self) -> np.ndarray:
        """Inner products of the unit directions. Shape ``(rows, N, N)``."""
        return self.inner * self.to_unit[:, :, None] * self.to_unit[:, None, :]


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Result of a row method.

    Attributes:
        coefficients: β, shape ``(rows, N)``: the merged row is Σ β_i V_i.
        length: Length of each merged row, shape ``(rows,)``.
        opposed: Rows whose directions cancel or cannot be interpolated, shape
            ``(rows,)``. They keep the direction of the input with the largest weight.
        cancelled: Rows of a sum whose length is lost in rounding, shape ``(rows,)``.
            Their length must be computed from the dense row.
    """

    coefficients: np.ndarray
    length: np.ndarray
    opposed: np.ndarray
    cancelled: np.ndarray


RowFunction = Callable[[Rows], Combination]
"""A row method."""
DirectionFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(Gram matrices of unit directions, weights) -> coefficients of a mean direction."""


def slerp(rows: Rows) -> Combination:
    r"""Interpolate directions on their great circle; take the weighted mean length.

    .. math:: \frac{\sin((1-t)\theta)}{\sin\theta} u_1 +
        \frac{\sin(t\theta)}{\sin\theta} u_2

    where t is the weight of the second direction. Shoemake, "Animating rotation with
    quaternion curves" (SIGGRAPH 1985), row by row.
    """
    return _mean(rows, _great_circle)


def karcher(rows: Rows) -> Combination:
    r"""Take the Karcher mean of the directions and the weighted mean of the lengths.

    .. math:: T = \sum_i w_i \frac{\theta_i}{\sin\theta_i}(u_i - \cos\theta_i\,u),
        \qquad u \leftarrow \cos\lVert T\rVert\,u +
        \sin\lVert T\rVert\,T / \lVert T\rVert

    The iteration starts at the normalized mean and ends when T vanishes
    (arXiv:2603.04972; Karcher 1977). u and T stay combinations of the u_i, so each step
    works on N coordinates per row.
    """
    return _mean(rows, _karcher_mean)


def nmean(rows: Rows) -> Combination:
    r"""Take the normalized :math:`\sum_i w_i u_i` and the weighted mean length.

    The mean of N nearly orthogonal unit vectors has length 1/√N before normalization.
    """
    return _mean(rows, _weighted)


def magnitude_weighted(rows: Rows) -> Combination:
    r"""Apply `nmean` with weights by how far each input moved the base's row length.

    .. math:: w'_{ij} \propto w_{ij} \, \bigl|\, |m_{ij}| - \lVert W_{0j}\rVert \bigr|

    so that a magnitude that only one task has moved survives the merge. A row that no
    input moved keeps its weights.
    """
    assert rows.base_norm is not None  # the method needs a base
    base_norm = rows.base_norm[:, None]
    moved = rows.weights * np.abs(np.abs(rows.magnitude) - base_norm)
    total = moved.sum(1, keepdims=True)
    has_moved = total > 1e-7 * base_norm  # ignore float32 rounding
    moved = np.where(has_moved, moved / np.where(has_moved, total, 1.0), rows.weights)
    return _mean(replace(rows, weights=moved), _weighted)


def linear(rows: Rows) -> Combination:
    """Take the weighted sum of the rows without normalizing them."""
    return _sum(rows, rows.weights)


def slerp_vectors(rows: Rows) -> Combination:
    """Apply slerp as mergekit does: the directions' coefficients multiply the rows."""
    cosine = np.clip(rows.gram[:, :1, 1], -1, 1)
    return _sum(rows, _turned(rows.weights, cosine, np.abs(cosine) > _COLLINEAR))


def nuslerp(rows: Rows) -> Combination:
    r"""Interpolate two rows, without normalizing them, along their great circle.

    .. math:: \frac{\sin((1-t)\theta)}{\sin\theta} V_1 +
        \frac{\sin(t\theta)}{\sin\theta} V_2, \qquad t = \frac{w_2}{w_1 + w_2}

    As in mergekit, parallel or opposite rows are interpolated linearly.
    """
    if rows.weights.shape[1] == 1:
        return linear(rows)
    cosine = np.clip(rows.gram[:, :1, 1], -1, 1)
    is_linear = 1 - np.square(cosine) <= _PARALLEL
    return _sum(rows, _turned(rows.weights, cosine, is_linear))


def model_stock(rows: Rows) -> Combination:
    r"""Model Stock (arXiv:2403.19522): the mean change, scaled by its angles.

    .. math:: W_0 + \frac{t}{N} \sum_i \tau_i, \qquad
        t = \frac{N \cos\theta}{1 + (N - 1)\cos\theta}

    where the cosine is the mean over all pairs of changes. The rows are changes from
    the base. Where the denominator vanishes, the base is kept.
    """
    count = rows.gram.shape[1]
    pairs = np.triu_indices(count, 1)
    cosine = np.clip(rows.gram[:, pairs[0], pairs[1]], -1, 1).mean(1, keepdims=True)
    under = 1 + (count - 1) * cosine
    is_singular = np.abs(under) < _SINGULAR
    t = np.where(is_singular, 0.0, count * cosine / np.where(is_singular, 1.0, under))
    merged = _sum(rows, np.repeat(t / count, count, axis=1))
    return replace(merged, opposed=is_singular[:, 0])


def of_changes(rows: Rows, function: RowFunction) -> Combination:
    r"""Apply a method to the changes from a base, which is the last row.

    .. math:: W_0 + \sum_i \beta_i (W_i - W_0) = \sum_i \beta_i W_i +
        \Bigl(1 - \sum_i \beta_i\Bigr) W_0
    """
    put = rows.length * rows.to_unit
    inner = rows.inner * put[:, :, None] * put[:, None, :]
    moved = inner[:, :-1, :-1] - inner[:, :-1, -1:] - inner[:, -1:, :-1]
    moved = moved + inner[:, -1:, -1:]
    size = gram_norm(moved)
    weights = rows.weights[:, :-1]
    combination = function(Rows(inner=moved, magnitude=size, weights=weights))
    beta = combination.coefficients
    merged = _sum(rows, np.concatenate([beta, 1 - beta.sum(1, keepdims=True)], axis=1))
    return replace(merged, opposed=combination.opposed)


def _sum(rows: Rows, weights: np.ndarray) -> Combination:
    alpha = weights * rows.length
    total = _length(alpha, rows.gram)
    parts = np.square(alpha).sum(1)
    return Combination(
        coefficients=alpha * rows.to_unit,
        length=total,
        opposed=np.zeros(len(alpha), bool),
        cancelled=cancels(np.square(total), parts) & (parts > 0),
    )


def _mean(rows: Rows, direction: DirectionFunction) -> Combination:
    """Combine a mean direction with the weighted mean of the lengths.

    A zero row has no direction: the other inputs share its weight, and its magnitude
    counts as 0. Where the directions cancel, the direction of the input with the
    largest weight is kept.
    """
    shared = np.where(rows.norm > 0, rows.weights, 0.0)
    total = shared.sum(1, keepdims=True)
    shared = shared / np.where(total > 0, total, 1.0)
    alpha = direction(rows.gram, shared)
    reach = _length(alpha, rows.gram)
    parts = np.abs(alpha).sum(1)
    opposed = (reach <= _VANISHES * parts) & (total[:, 0] > 0) | ~np.isfinite(reach)
    if opposed.any():
        alpha = np.where(opposed[:, None], heaviest(shared), alpha)
        reach = np.where(opposed, 1.0, reach)
    target = (rows.weights * rows.length).sum(1)
    scale = np.where(reach > 0, target / np.where(reach > 0, reach, 1.0), 0.0)
    return Combination(
        coefficients=scale[:, None] * alpha * rows.to_unit,
        length=np.where(reach > 0, target, 0.0),
        opposed=opposed,
        cancelled=np.zeros(len(alpha), bool),
    )


def _turned(
    weights: np.ndarray, cosine: np.ndarray, is_linear: np.ndarray
) -> np.ndarray:
    """Coefficients on the great circle at these cosines; the weights if `is_linear`."""
    theta = np.arccos(np.where(is_linear, 0.0, cosine))
    return np.where(is_linear, weights, np.sin(weights * theta) / np.sin(theta))


def _great_circle(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    if gram.shape[1] == 1:
        return weights
    cosine = np.clip(gram[:, :1, 1], -1.0, 1.0)
    return _turned(weights, cosine, np.arccos(cosine) < _SAME_DIRECTION)


def _weighted(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights


def _karcher_mean(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    mean = _normalized(weights, gram)
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
        mean = _normalized(np.cos(length) * mean + np.sin(length) * unit, gram)
    return mean


def _normalized(coordinates: np.ndarray, gram: np.ndarray) -> np.ndarray:
    length = _length(coordinates, gram)[:, None]
    return coordinates / np.where(length > 0, length, 1.0)


def _length(coordinates: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Length of each row's combination of directions. Shape ``(rows,)``."""
    square = np.einsum("ji,jik,jk->j", coordinates, gram, coordinates, optimize=True)
    return np.sqrt(np.maximum(square, 0.0))


def heaviest(weights: np.ndarray) -> np.ndarray:
    """1 at each row's largest weight (the first, if equal), 0 elsewhere."""
    return np.eye(weights.shape[1])[weights.argmax(1)]
