r"""Methods that merge rows: each returns a combination of the rows it is given.

:math:`W'_j = \sum_i \beta_{ij} V_{ij}`, with coefficients that follow from the inner
products of the rows, their lengths and the weights. Adapters are closed under such
methods (`mlx_dora.merge.adapters.factored`). Everything is float64.
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

# A mean of directions shorter than this share of its parts has no sure direction.
_VANISHES = 1e-3
# Where mergekit's cosine is above it, its slerp interpolates linearly.
_COLLINEAR = 0.9995

# Where mergekit's nuslerp takes rows for parallel, by the square of the sine.
_PARALLEL = 1e-16

# Below it the denominator of Model Stock counts as 0, as in mergekit.
_SINGULAR = 1e-6


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a method knows of N rows that it merges, for each output row.

    Attributes:
        inner: ⟨V_i, V_k⟩ of the rows before scaling. Shape ``(rows, N, N)``.
        magnitude: Length that each input gives its row; negative turns the direction
            round. Shape ``(rows, N)``.
        weights: Shape ``(rows, N)``; those of a mean sum to 1.
        base_norm: Length of the base's row. Shape ``(rows,)``; None without a base.
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
        """Where a row is not zero. Shape ``(rows, N)``."""
        return self.norm > 0

    @cached_property
    def to_unit(self) -> np.ndarray:
        """Factors that turn the rows into unit directions; 0 for zero rows."""
        sign = np.where(self.magnitude < 0, -1.0, 1.0)
        safe = np.where(self.has_direction, self.norm, 1.0)
        return np.where(self.has_direction, sign / safe, 0.0)

    @cached_property
    def length(self) -> np.ndarray:
        """Lengths after scaling; 0 where there is no direction."""
        return np.where(self.has_direction, np.abs(self.magnitude), 0.0)

    @cached_property
    def gram(self) -> np.ndarray:
        """Inner products of the unit directions. Shape ``(rows, N, N)``."""
        return self.inner * self.to_unit[:, :, None] * self.to_unit[:, None, :]


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


RowFunction = Callable[[Rows], Combination]
"""A method of rows."""
DirectionFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(Gram matrices of unit directions, weights) -> coefficients of a mean direction."""


def slerp(rows: Rows) -> Combination:
    """The great circle between two directions; the weighted mean of the lengths."""
    return _mean(rows, directions.slerp)


def karcher(rows: Rows) -> Combination:
    """The Karcher mean of the directions; the weighted mean of the lengths."""
    return _mean(rows, directions.karcher)


def nmean(rows: Rows) -> Combination:
    """The normalised mean of the directions; the weighted mean of the lengths."""
    return _mean(rows, directions.nmean)


def magnitude_weighted(rows: Rows) -> Combination:
    """`nmean`, each row weighted by how far its input moved the base's length.

    Raises:
        DoRAError: Without a base.
    """
    if rows.base_norm is None:
        raise DoRAError("magnitude_weighted needs a base to compare with.")
    weights = moved_weights(rows.magnitude, rows.base_norm, rows.weights)
    return _mean(rows, directions.nmean, weights)


def linear(rows: Rows) -> Combination:
    """The weighted sum of the rows as they are."""
    return _sum(rows, rows.weights)


def slerp_vectors(rows: Rows) -> Combination:
    """Slerp as in mergekit: the coefficients of the directions, put on the rows.

    Raises:
        DoRAError: If there are not two inputs.
    """
    if rows.weights.shape[1] != 2:
        raise DoRAError(f"slerp takes two inputs, got {rows.weights.shape[1]}.")
    cosine = np.clip(rows.gram[:, :1, 1], -1, 1)
    is_linear = np.abs(cosine) > _COLLINEAR
    theta = np.arccos(np.where(is_linear, 0.0, cosine))
    turned = np.sin(rows.weights * theta) / np.sin(theta)
    return _sum(rows, np.where(is_linear, rows.weights, turned))


def nuslerp(rows: Rows) -> Combination:
    r"""Interpolation of two rows as they are, along the great circle they span.

    .. math:: \frac{\sin((1-t)\theta)}{\sin\theta} V_1 +
        \frac{\sin(t\theta)}{\sin\theta} V_2, \qquad t = \frac{w_2}{w_1 + w_2}

    as in mergekit: a straight line where the rows are parallel or opposed.
    """
    if rows.weights.shape[1] == 1:
        return linear(rows)
    cosine = np.clip(rows.gram[:, :1, 1], -1, 1)
    is_linear = 1 - np.square(cosine) <= _PARALLEL
    theta = np.arccos(np.where(is_linear, 0.0, cosine))
    turned = np.sin(rows.weights * theta) / np.sin(theta)
    return _sum(rows, np.where(is_linear, rows.weights, turned))


def model_stock(rows: Rows) -> Combination:
    r"""Model Stock (arXiv:2403.19522): the mean change, shortened by the angles.

    .. math:: W_0 + \frac{t}{N} \sum_i \tau_i, \qquad
        t = \frac{N \cos\theta}{1 + (N - 1)\cos\theta}

    where the cosine is the mean over all pairs of changes. The rows are changes of the
    base; where the denominator vanishes the base is kept.
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
    r"""Apply a method to the changes of a base, which is the last of the rows.

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
    """A mean direction with the weighted mean of the lengths.

    A row that is zero in an input has no direction there: the others share its weight,
    and its magnitude counts as 0. Where the directions cancel, the heaviest input's is
    kept.
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
