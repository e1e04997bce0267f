r"""Row methods: each returns a combination of the input rows.

The combination is :math:`W'_j = \sum_i \beta_{ij} V_{ij}`, with coefficients that
depend on the inner products of the rows, their lengths and the weights. Adapters are
closed under these methods (`mlx_dora.merge.adapters.factored`). Everything is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.matrix.grams import gram_norm
from mlx_dora.matrix.terms import cancels
from mlx_dora.merge.methods import directions
from mlx_dora.merge.methods.directions import heaviest, length_of, moved_weights

# A mean of directions shorter than this share of its parts has no reliable direction.
_VANISHES = 1e-3
# Cosine above which mergekit's slerp interpolates linearly.
_COLLINEAR = 0.9995

# Squared sine below which mergekit's nuslerp treats rows as parallel.
_PARALLEL = 1e-16

# Below this the denominator of Model Stock counts as 0, as in mergekit.
_SINGULAR = 1e-6


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
    def has_direction(self) -> np.ndarray:
        """Whether each row is nonzero. Shape ``(rows, N)``."""
        return self.norm > 0

    @cached_property
    def to_unit(self) -> np.ndarray:
        """Factors that scale the rows to unit directions; 0 for zero rows."""
        sign = np.where(self.magnitude < 0, -1.0, 1.0)
        safe = np.where(self.has_direction, self.norm, 1.0)
        return np.where(self.has_direction, sign / safe, 0.0)

    @cached_property
    def length(self) -> np.ndarray:
        """Lengths after scaling; 0 for zero rows."""
        return np.where(self.has_direction, np.abs(self.magnitude), 0.0)

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
    """Interpolate directions on their great circle; take the weighted mean length."""
    return _mean(rows, directions.slerp)


def karcher(rows: Rows) -> Combination:
    """Take the Karcher mean of the directions and the weighted mean of the lengths."""
    return _mean(rows, directions.karcher)


def nmean(rows: Rows) -> Combination:
    """Take the normalized mean of the directions and the weighted mean length."""
    return _mean(rows, directions.nmean)


def magnitude_weighted(rows: Rows) -> Combination:
    """Apply `nmean` with weights by how far each input moved the base's row length.

    Raises:
        DoRAError: If there is no base.
    """
    if rows.base_norm is None:
        raise DoRAError(
            "magnitude_weighted compares row lengths with a base: give a base."
        )
    weights = moved_weights(rows.magnitude, rows.base_norm, rows.weights)
    return _mean(rows, directions.nmean, weights)


def linear(rows: Rows) -> Combination:
    """Take the weighted sum of the rows without normalizing them."""
    return _sum(rows, rows.weights)


def slerp_vectors(rows: Rows) -> Combination:
    """Apply slerp as mergekit does: the directions' coefficients multiply the rows.

    Raises:
        DoRAError: If the number of inputs is not two.
    """
    if rows.weights.shape[1] != 2:
        raise DoRAError(f"slerp merges two inputs, got {rows.weights.shape[1]}.")
    cosine = np.clip(rows.gram[:, :1, 1], -1, 1)
    is_linear = np.abs(cosine) > _COLLINEAR
    theta = np.arccos(np.where(is_linear, 0.0, cosine))
    turned = np.sin(rows.weights * theta) / np.sin(theta)
    return _sum(rows, np.where(is_linear, rows.weights, turned))


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
    theta = np.arccos(np.where(is_linear, 0.0, cosine))
    turned = np.sin(rows.weights * theta) / np.sin(theta)
    return _sum(rows, np.where(is_linear, rows.weights, turned))


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
    return Combination(
        coefficients=merged.coefficients,
        length=merged.length,
        opposed=combination.opposed,
        cancelled=merged.cancelled,
    )


def _sum(rows: Rows, weights: np.ndarray) -> Combination:
    alpha = weights * rows.length
    total = length_of(alpha, rows.gram)
    parts = np.square(alpha).sum(1)
    return Combination(
        coefficients=alpha * rows.to_unit,
        length=total,
        opposed=np.zeros(len(alpha), bool),
        cancelled=cancels(np.square(total), parts) & (parts > 0),
    )


def _mean(
    rows: Rows, direction: DirectionFunction, weights: np.ndarray | None = None
) -> Combination:
    """Combine a mean direction with the weighted mean of the lengths.

    A zero row has no direction: the other inputs share its weight, and its magnitude
    counts as 0. Where the directions cancel, the direction of the input with the
    largest weight is kept.
    """
    weights = rows.weights if weights is None else weights
    shared = np.where(rows.has_direction, weights, 0.0)
    total = shared.sum(1, keepdims=True)
    shared = shared / np.where(total > 0, total, 1.0)
    alpha = direction(rows.gram, shared)
    reach = length_of(alpha, rows.gram)
    parts = np.abs(alpha).sum(1)
    opposed = (reach <= _VANISHES * parts) & (total[:, 0] > 0) | ~np.isfinite(reach)
    if opposed.any():
        alpha = np.where(opposed[:, None], heaviest(shared), alpha)
        reach = np.where(opposed, 1.0, reach)
    target = (weights * rows.length).sum(1)
    scale = np.where(reach > 0, target / np.where(reach > 0, reach, 1.0), 0.0)
    return Combination(
        coefficients=scale[:, None] * alpha * rows.to_unit,
        length=np.where(reach > 0, target, 0.0),
        opposed=opposed,
        cancelled=np.zeros(len(alpha), bool),
    )
