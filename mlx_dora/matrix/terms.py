r"""DoRA's equations on the factored terms of an adapted row, each of them once.

.. math:: n^2 = \lVert W_0 + s\,BA \rVert^2 = q_0 + 2s\,c + s^2 p

with :math:`q_0 = \lVert W_0\rVert^2`, :math:`c = \langle W_0, BA\rangle` and
:math:`p = \lVert BA\rVert^2` per output row (``docs/method.md``, "Factored terms"). The
same formulas serve MLX's float32 and NumPy's float64.
"""

from dataclasses import dataclass
from typing import Generic

import mlx.core as mx
import numpy as np

from mlx_dora.matrix.low_rank import Adapted, Array, LowRank, row_inner
from mlx_dora.matrix.weight import (
    Weight,
    are_ordinary,
    base_products,
    beyond_squares,
    float32_rows,
)

# Under this share of its parts a factored sum may be off by more than 1e-5.
_CANCELS = 2.0**-6
# Under this share of ‖W0‖² + s²‖BA‖² a factored n² is rounding noise.
_NOISE = 2.0**-20
# Elements of a float64 block of rows that are taken densely.
_BLOCK = 1 << 18


def cancels(total: Array, parts: Array) -> Array:
    """Whether a sum is so much smaller than its parts that rounding shows in it."""
    return total < _CANCELS * parts


def row_gain(magnitude: mx.array, norm: mx.array) -> mx.array:
    """The factor g = m / n of each row, float32; 0 where the norm is 0."""
    lives = norm > 0
    return mx.where(
        lives, magnitude.astype(mx.float32) / mx.where(lives, norm, 1.0), 0.0
    )


def one_minus_cosine(base: mx.array, norm: mx.array, update: mx.array) -> mx.array:
    r"""1 − cos of the angle between the sides `base` and `norm` of a triangle.

    .. math:: 1 - \cos\theta = \frac{d^2 - (n - b)^2}{2 b n}

    The law of cosines for W0, W0 + sBA and sBA, so that lengths alone will do; its form
    keeps a small angle that b² + n² − d² would lose.

    Args:
        base: b = ‖W0‖ of each row. Shape ``(out,)``.
        norm: n = ‖W0 + sBA‖. Shape ``(out,)``.
        update: d = ‖sBA‖. Shape ``(out,)``.

    Returns:
        Between 0 and 2; 0 where a side is zero. Shape ``(out,)``.
    """
    change = norm - base
    sides = base * norm
    raw = (update - change) * (update + change) / mx.where(sides > 0, 2 * sides, 1)
    return mx.where(sides > 0, mx.clip(raw, 0.0, 2.0), 0.0)


@dataclass(frozen=True, kw_only=True)
class Terms(Generic[Array]):
    """Inner products of each row of W0 with its update. All ``(..., out)``.

    Attributes:
        q0: ‖W0‖².
        c: ⟨W0, BA⟩.
        p: ‖BA‖².
        scale: Multiplier s of the update BA.
    """

    q0: Array
    c: Array
    p: Array
    scale: float

    @property
    def squared(self) -> Array:
        """n² = ‖W0 + s·BA‖²; rounding can make it negative."""
        return self.q0 + (2 * self.scale) * self.c + self.scale**2 * self.p

    @property
    def parts(self) -> Array:
        """‖W0‖² + ‖s·BA‖², what `squared` may cancel from."""
        return self.q0 + self.scale**2 * self.p

    @property
    def cancelled(self) -> Array:
        """Rows that the update nearly removes, in which `squared` is inexact."""
        return cancels(self.squared, self.parts)


def terms_of(q0: mx.array, product: mx.array, update: LowRank) -> Terms[mx.array]:
    """The terms of an update, given ‖W0‖² and U = W0·A.

    Args:
        q0: Shape ``(..., out)``, float32.
        product: Shape ``(..., out, r)``, float32.
        update: A ``(..., in, r)`` and B ``(..., r, out)``.
    """
    a = update.lora_a.astype(mx.float32)
    b = update.lora_b.astype(mx.float32).swapaxes(-1, -2)  # (..., out, r)
    p = row_inner(a, b, a, b)
    return Terms(q0=q0, c=(product * b).sum(-1), p=p, scale=update.scale)


def floored_norm(terms: Terms[mx.array]) -> mx.array:
    """N for training, floored where the sum is noise: never below 2⁻¹⁰ of its parts."""
    return mx.sqrt(mx.maximum(terms.squared, _NOISE * terms.parts))


@dataclass(frozen=True, kw_only=True)
class ExactTerms(Terms[mx.array]):
    """Terms with an exact norm, for inference, fuse, analysis and merging.

    Attributes:
        norm: n = ‖W0 + s·BA‖, right for every finite row; the other terms are squares,
            which over- or underflow outside norms of about 1e-19 to 1e19.
        recomputed: Rows that nearly cancel, whose norm was taken from the dense row.
    """

    norm: mx.array
    recomputed: int = 0


def exact_terms(weight: Weight, update: LowRank) -> ExactTerms:
    """Terms and norm of an adapted matrix in float32, W0 read once.

    Args:
        weight: Base weight. Shape ``(out, in)``, any float dtype or packed.
        update: Its update.

    Returns:
        The terms, evaluated. Rows whose update cancels all but an eighth of their
        length are recomputed densely and counted.

    Raises:
        DoRAError: If the shapes do not fit together.
    """
    update.check_fits(weight.shape)
    scaled = update.near_one()
    q0, product = base_products(weight, scaled.lora_a)
    return with_exact_norm(weight, update, terms_of(q0, product, scaled))


def with_exact_norm(
    weight: Weight, update: LowRank, terms: Terms[mx.array]
) -> ExactTerms:
    """Add the norm to the terms of an update.

    Only rows that cancel, or whose squares are beyond float32, are read.
    """
    norm, cancelled = mx.sqrt(mx.maximum(terms.squared, 0.0)), terms.cancelled
    inexact = cancelled | mx.isnan(terms.squared)
    if not are_ordinary(terms.parts):
        inexact = inexact | beyond_squares(terms.parts)
    mx.eval(terms.q0, terms.c, terms.p, norm, cancelled, inexact)
    rows = np.flatnonzero(np.array(inexact))
    if rows.size:
        norm[mx.array(rows)] = mx.array(_dense_norms(weight, update, rows))
        mx.eval(norm)
    return ExactTerms(
        q0=terms.q0,
        c=terms.c,
        p=terms.p,
        scale=terms.scale,
        norm=norm,
        recomputed=int(cancelled.sum()),
    )


def _dense_norms(weight: Weight, update: LowRank, rows: np.ndarray) -> np.ndarray:
    """‖W0 + s·BA‖ of some rows, summed in float64. Shape ``(len(rows),)``, float32."""
    own = update.float64()
    norms = []
    for index in np.array_split(rows, -(-rows.size * own.a.shape[0] // _BLOCK) or 1):
        base = np.array(float32_rows(weight, mx.array(index)), np.float64)
        norms.append(np.linalg.norm(base + own.rows(index), axis=1))
    with np.errstate(over="ignore"):
        return np.concatenate(norms).astype(np.float32)


def exact_gain(weight: Weight, adapted: Adapted) -> mx.array:
    """The factor m / ‖W0 + s·BA‖ of each row of a DoRA adapter. Shape ``(out,)``."""
    assert adapted.m is not None
    return row_gain(adapted.m, exact_terms(weight, adapted.update).norm)
