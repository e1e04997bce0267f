r"""DoRA's equations on the factored terms of an adapted row.

.. math:: n^2 = \lVert W_0 + s\,BA \rVert^2 = q_0 + 2s\,c + s^2 p

with :math:`q_0 = \lVert W_0\rVert^2`, :math:`c = \langle W_0, BA\rangle` and
:math:`p = \lVert BA\rVert^2` per output row (``docs/method.md``, "Factored terms"). The
same formulas serve MLX's float32 and NumPy's float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, cast

import mlx.core as mx
import numpy as np

from mlx_dora.matrix.low_rank import Adapted, Array, LowRank
from mlx_dora.matrix.sharded import ShardedWeight
from mlx_dora.matrix.weight import (
    Weight,
    are_ordinary,
    base_products,
    beyond_squares,
    float32_rows,
)

# Below this share of its parts, a factored sum may have an error above 1e-5.
_CANCELS = 2.0**-6
# Below this share of ‖W0‖² + s²‖BA‖², a factored n² is rounding noise.
_NOISE = 2.0**-20
# Elements of a float64 block of rows that are computed densely.
_BLOCK = 1 << 18


def cancels(total: Array, parts: Array) -> Array:
    """Return whether a sum is so small relative to its parts that rounding matters."""
    return total < _CANCELS * parts


def row_gain(magnitude: mx.array, norm: mx.array) -> mx.array:
    """Return the gain g = m / n of each row in float32; 0 where the norm is 0."""
    lives = norm > 0
    return mx.where(
        lives, magnitude.astype(mx.float32) / mx.where(lives, norm, 1.0), 0.0
    )


_constant_norm_gain = mx.custom_function(row_gain)


@_constant_norm_gain.vjp
def _gain_vjp(primals: Any, cotangent: mx.array, gain: mx.array) -> Any:
    # 1/n from the gain, which the backward pass needs anyway: n need not be kept.
    magnitude, norm = primals
    m = magnitude.astype(mx.float32)
    inverse = mx.where(m != 0, gain / mx.where(m != 0, m, 1.0), 0.0)
    return (cotangent * inverse).astype(magnitude.dtype), mx.zeros_like(norm)


trained_gain = cast(Callable[[mx.array, mx.array], mx.array], _constant_norm_gain)
"""`row_gain` for training, where the norm is a constant (section 4.3 of DoRA).

The gradient of a magnitude of 0 is 0: such a magnitude stays 0.
"""


def one_minus_cosine(base: mx.array, norm: mx.array, update: mx.array) -> mx.array:
    r"""Return 1 − cos of the angle between the sides `base` and `norm` of a triangle.

    .. math:: 1 - \cos\theta = \frac{d^2 - (n - b)^2}{2 b n}

    This is the law of cosines for W0, W0 + sBA and sBA, which needs only lengths. This
    form keeps small angles that b² + n² − d² would lose.

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
    """Inner products of the rows of W0 and the update. Shapes ``(..., out)``.

    Attributes:
        q0: ‖W0‖².
        c: ⟨W0, BA⟩.
        p: ‖BA‖².
        scale: Multiplier s of the update BA.
        squared: n² = ‖W0 + s·BA‖², which rounding can make negative.
        parts: ‖W0‖² + ‖s·BA‖², the size of the parts that cancel in `squared`.
    """

    q0: Array
    c: Array
    p: Array
    scale: float
    squared: Array = field(init=False)
    parts: Array = field(init=False)

    def __post_init__(self) -> None:
        update = self.scale**2 * self.p
        squared = self.q0 + (2 * self.scale) * self.c + update
        object.__setattr__(self, "squared", squared)
        object.__setattr__(self, "parts", self.q0 + update)

    @property
    def cancelled(self) -> Array:
        """Whether the update nearly cancels a row, so that `squared` is inexact."""
        return cancels(self.squared, self.parts)


def terms_of(q0: mx.array, product: mx.array, update: LowRank) -> Terms[mx.array]:
    """Return the terms of an update, given ‖W0‖² and U = W0·A.

    Args:
        q0: ‖W0‖², shape ``(..., out)``, float32.
        product: U = W0·A, shape ``(..., out, r)``, float32.
        update: The update, with A ``(..., in, r)`` and B ``(..., r, out)``.
    """
    # In the layout of B, not of Bᵀ: the sum then runs along rows of memory.
    b = update.lora_b.astype(mx.float32)  # (..., r, out)
    c = (product.swapaxes(-1, -2) * b).sum(-2)
    return Terms(q0=q0, c=c, p=update.squared_rows(), scale=update.scale)


def floored_norm(terms: Terms[mx.array]) -> mx.array:
    """Return the norm for training, at least 2⁻¹⁰ of its parts to exclude noise."""
    return mx.sqrt(mx.maximum(terms.squared, _NOISE * terms.parts))


@dataclass(frozen=True, kw_only=True)
class ExactTerms(Terms[mx.array]):
    """Terms with an exact norm, for inference, fuse, analysis and merging.

    Attributes:
        norm: n = ‖W0 + s·BA‖, accurate for every finite row. The other terms are
            squares, which overflow or underflow for norms outside 1e-19 to 1e19.
        recomputed: Number of rows that nearly cancel; their norms come from dense rows.
    """

    norm: mx.array
    recomputed: int = 0


def exact_terms(weight: Weight, update: LowRank) -> ExactTerms:
    """Compute terms and norm of an adapted matrix in float32, reading W0 once.

    Args:
        weight: Base weight. Shape ``(out, in)``, any float dtype or packed.
        update: Update of this weight.

    Returns:
        The evaluated terms. Rows whose update cancels all but an eighth of their
        length are recomputed densely and counted.

    Raises:
        DoRAError: If the shapes do not fit together.
    """
    update.check_fits(weight.shape)
    if isinstance(weight, ShardedWeight) and not weight.axis:
        return _gathered_terms(weight, update)
    scaled = update.with_unit_columns()
    q0, product = base_products(weight, scaled.lora_a)
    return with_exact_norm(weight, update, terms_of(q0, product, scaled))


def _gathered_terms(weight: ShardedWeight, update: LowRank) -> ExactTerms:
    """Compute the terms of the own rows, dense rows included, and gather them."""
    own = exact_terms(weight.part, update.for_rows(weight.own))
    columns = mx.stack([own.q0, own.c, own.p, own.norm], axis=1)
    count = mx.distributed.all_sum(mx.array(own.recomputed), group=weight.group)
    q0, c, p, norm = weight.gathered(columns).T
    mx.eval(q0, c, p, norm, count)
    return ExactTerms(
        q0=q0, c=c, p=p, scale=update.scale, norm=norm, recomputed=int(count)
    )


def with_exact_norm(
    weight: Weight, update: LowRank, terms: Terms[mx.array]
) -> ExactTerms:
    """Add the norm to the terms of an update.

    Only rows that cancel, or whose squares exceed the range of float32, are read.
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
    """Return ‖W0 + s·BA‖ of rows, summed in float64: ``(len(rows),)``, float32."""
    own = update.float64()
    norms = []
    for index in np.array_split(rows, -(-rows.size * own.a.shape[0] // _BLOCK) or 1):
        base = np.array(float32_rows(weight, mx.array(index)), np.float64)
        norms.append(np.linalg.norm(base + own.rows(index), axis=1))
    with np.errstate(over="ignore"):
        return np.concatenate(norms).astype(np.float32)


def exact_gain(weight: Weight, adapted: Adapted) -> mx.array:
    """Return the gain m / ‖W0 + s·BA‖ of each row. Shape ``(out,)``."""
    assert adapted.m is not None
    return row_gain(adapted.m, exact_terms(weight, adapted.update).norm)
