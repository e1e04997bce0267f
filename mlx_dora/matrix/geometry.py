"""Changes in length and angle of each row of a weight, without building W'.

They come from the factored terms of an adapter (`docs/method.md`, "Factored terms") or
from two weights that are read side by side. Analysis and the demo use them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.matrix.low_rank import Adapted, Factors
from mlx_dora.matrix.terms import Terms, cancels
from mlx_dora.matrix.weight import (
    Weight,
    base_products,
    float32_rows,
    row_blocks,
    row_dot,
)

# Elements of a float64 block of rows that are computed densely.
_BLOCK = 1 << 18
# Elements of each of the two float64 blocks held when two weights are compared.
_PAIR_BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class RowGeometry:
    """Change of each output row in length and direction. Shapes ``(out,)``, float64.

    Attributes:
        base_norm: ‖W0‖.
        delta_m: Change of length, in units of the weight.
        angle: Angle between base row and adapted row in radians, 0 to π.
        recomputed: Number of rows computed densely because factored sums cancel.
    """

    base_norm: np.ndarray
    delta_m: np.ndarray
    angle: np.ndarray
    recomputed: int = 0

    @property
    def is_finite(self) -> bool:
        """Whether all rows are finite, before and after."""
        return all(
            bool(np.isfinite(values).all())
            for values in (self.base_norm, self.delta_m, self.angle)
        )

    @property
    def mean_delta_m(self) -> float:
        """ΔM of section 3.2 of DoRA: the mean of |Δm| over rows."""
        return float(np.abs(self.delta_m).mean())

    @property
    def mean_delta_d(self) -> float:
        """ΔD of section 3.2 of DoRA: the mean of 1 − cos(angle) over rows."""
        return float((2 * np.sin(self.angle / 2) ** 2).mean())


def row_geometry(weight: Weight, adapted: Adapted) -> RowGeometry:
    r"""Compare every adapted row with its base row, reading W0 once.

    .. math:: \tan\theta = s\sqrt{q_0 p - c^2} \, / \, (q_0 + s c)

    The arctangent keeps small angles that :math:`1 - \cos\theta` would lose. A negative
    magnitude reverses the row, so that its angle is :math:`\pi - \theta`. W0·A is
    float32 and all sums are float64: if a length changes by a thousandth, five digits
    of the change are correct. Rows in which a sum cancels are computed densely.

    Args:
        weight: Base weight. Shape ``(out, in)``, any float dtype or packed.
        adapted: The adapter of this matrix. Without magnitudes, the length of a row is
            ‖W0 + s·BA‖.

    Returns:
        The geometry. A row that is zero before or after has angle 0.

    Raises:
        DoRAError: If the shapes do not fit together.
    """
    update = adapted.update
    update.check_fits(weight.shape)
    q0, product = base_products(weight, update.lora_a, in_float64=True)
    own = update.float64()
    c = (product * own.b).sum(1)
    p = np.maximum(own.inner(own), 0.0)
    terms = Terms(q0=q0, c=c, p=p, scale=1.0)  # s is in B
    squared = np.maximum(terms.squared, 0.0)
    inside, across = q0 + c, np.maximum(q0 * p - c * c, 0.0)
    inexact = terms.cancelled | cancels(across, q0 * p)
    rows = np.flatnonzero(inexact & (q0 > 0) & (p > 0))
    squared[rows], c[rows], across[rows] = _dense_terms(weight, own, rows)
    across[rows] *= q0[rows]
    inside[rows] = q0[rows] + c[rows]
    base_norm = np.sqrt(q0)
    norm = np.where(squared > 0, np.sqrt(squared), 0.0)
    angle = np.arctan2(np.sqrt(across), inside)
    if adapted.m is None:
        length = norm
        # n − ‖W0‖ = (n² − q0)/(n + ‖W0‖), which avoids cancellation.
        both = norm + base_norm
        delta_m = np.divide(2 * c + p, both, out=np.zeros_like(both), where=both > 0)
        delta_m = np.where(norm > 0, delta_m, -base_norm)
    else:
        magnitude = np.array(adapted.m.astype(mx.float32), np.float64)
        length = np.where(norm > 0, np.abs(magnitude), 0.0)
        delta_m = length - base_norm
        angle = np.where(magnitude < 0, np.pi - angle, angle)
    return RowGeometry(
        base_norm=base_norm,
        delta_m=delta_m,
        angle=np.where((base_norm > 0) & (length > 0), angle, 0.0),
        recomputed=int(rows.size),
    )


def _dense_terms(weight: Weight, own: Factors, rows: np.ndarray) -> np.ndarray:
    """Compute n², c and the squared orthogonal part of the update densely.

    Shape ``(3, len(rows))``.
    """
    result = np.empty((3, rows.size))
    chunks = -(-rows.size * own.a.shape[0] // _BLOCK) or 1
    for places in np.array_split(np.arange(rows.size), chunks):
        if not places.size:
            continue
        index = rows[places]
        base = np.array(float32_rows(weight, mx.array(index)), np.float64)
        delta = own.rows(index)
        c = (base * delta).sum(1)
        away = delta - (c / np.square(base).sum(1))[:, None] * base
        squared = np.square(base + delta).sum(1)
        result[:, places] = squared, c, np.square(away).sum(1)
    return result


def pair_geometry(base: Weight, adapted: Weight) -> RowGeometry:
    """Compare every row of two weights in length and angle, reading both once.

    The results come from the difference of the two rows and its part orthogonal to the
    base row, in float64, one block of rows at a time. Neither a tiny angle nor a tiny
    change of length is lost to cancellation.

    Args:
        base: First weight. Shape ``(out, in)``, any float dtype or packed.
        adapted: Second weight, of the same shape.

    Raises:
        DoRAError: If the shapes differ.
    """
    if base.shape != adapted.shape:
        raise DoRAError(
            f"the weights have shapes {tuple(base.shape)} and {tuple(adapted.shape)}; "
            "they must be the same."
        )
    pairs = zip(
        row_blocks(base, _PAIR_BLOCK), row_blocks(adapted, _PAIR_BLOCK), strict=True
    )
    return blocks_geometry(
        (np.array(before.astype(mx.float32)), np.array(after.astype(mx.float32)))
        for (_, before), (_, after) in pairs
    )


def blocks_geometry(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
) -> RowGeometry:
    """Compute `pair_geometry` from pairs of blocks of rows, before and after."""
    norms, changes, angles = [], [], []
    for before, after in pairs:
        full = before.astype(np.float64)
        delta = after.astype(np.float64)
        delta -= full
        q0 = row_dot(full, full)
        c = row_dot(full, delta)
        p = row_dot(delta, delta)
        share = np.divide(c, q0, out=np.zeros_like(c), where=q0 > 0)
        full *= share[:, None]
        delta -= full
        away = np.sqrt(row_dot(delta, delta) * q0)
        # Where 2c + p cancels, the row nearly vanished. Its parts parallel and
        # orthogonal to the base row still give its length.
        norm = np.hypot((1 + share) * np.sqrt(q0), np.sqrt(_across(away, q0, p)))
        base_norm = np.sqrt(q0)
        both = norm + base_norm
        norms.append(base_norm)
        changes.append(
            np.divide(2 * c + p, both, out=np.zeros_like(both), where=both != 0)
        )
        has_angle = (q0 != 0) & (norm != 0)  # keeps NaN
        angles.append(np.where(has_angle, np.arctan2(away, q0 + c), 0.0))
    return RowGeometry(
        base_norm=np.concatenate(norms),
        delta_m=np.concatenate(changes),
        angle=np.concatenate(angles),
    )


def _across(away: np.ndarray, q0: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return the squared part of the change orthogonal to the base row.

    If the base row is zero, this is the whole change.
    """
    return np.divide(np.square(away), q0, out=p.copy(), where=q0 > 0)
