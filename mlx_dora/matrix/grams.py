"""Inner products of the rows of N adapted weights over one base."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dora.matrix.low_rank import Factors, LowRank
from mlx_dora.matrix.terms import Terms
from mlx_dora.matrix.weight import Weight, base_products, float32_rows


@dataclass(frozen=True, kw_only=True)
class RowGrams:
    """Inner products of the rows of N adapted weights over one base, in float64.

    Attributes:
        inner: ``inner[j, i, k]`` is ⟨W0 + s_i·B_iA_i, W0 + s_k·B_kA_k⟩ of row j. Shape
            ``(out, N, N)``.
        base_norm: ‖W0‖ of each row. Shape ``(out,)``.
        recomputed: Number of rows computed densely because an update nearly cancels
            the base.
        factors: The N updates in float64.
    """

    inner: np.ndarray
    base_norm: np.ndarray
    recomputed: int
    factors: list[Factors]

    @property
    def norm(self) -> np.ndarray:
        """‖W0 + s_i·B_iA_i‖ of each row. Shape ``(out, N)``."""
        return gram_norm(self.inner)


def gram_norm(inner: np.ndarray) -> np.ndarray:
    """Return lengths ``(rows, N)`` of vectors with Gram matrices ``(rows, N, N)``."""
    return np.sqrt(np.maximum(np.einsum("jii->ji", inner), 0.0))


def row_grams(weight: Weight, updates: Sequence[LowRank]) -> RowGrams:
    r"""Compute inner products of every pair of adapted rows, reading W0 once.

    .. math:: \langle V_i, V_k \rangle_j = q_0 + s_i c_i + s_k c_k + s_i s_k
        (B_i^\top A_i^\top A_k B_k)_{jj}

    with q0 and c as in `mlx_dora.matrix.terms.Terms`. W0·A is computed in float32, one
    block of rows at a time; sums over ranks and pairs are float64. No ``(out, in)``
    array is built.

    Args:
        weight: Base weight. Shape ``(out, in)``, any float dtype or packed.
        updates: The N updates.

    Raises:
        DoRAError: If the shapes do not fit together.
    """
    for update in updates:
        update.check_fits(weight.shape)
    lora_a = mx.concatenate(
        [update.lora_a.astype(mx.float32) for update in updates], axis=1
    )
    q0, product = base_products(weight, lora_a, in_float64=True)  # (out,), (out, Σr)
    ends = np.cumsum([0, *[update.lora_a.shape[-1] for update in updates]])
    factors = [update.float64() for update in updates]
    cross = [
        (product[:, start:end] * own.b).sum(1)
        for own, start, end in zip(factors, ends, ends[1:], strict=False)
    ]
    count = len(updates)
    inner = np.empty((q0.size, count, count))
    cancelled = np.zeros(q0.size, bool)
    for i, own in enumerate(factors):
        terms = Terms(q0=q0, c=cross[i], p=own.inner(own), scale=1.0)
        inner[:, i, i] = terms.squared
        cancelled |= terms.cancelled
        for k in range(i + 1, count):
            both = q0 + cross[i] + cross[k] + own.inner(factors[k])
            inner[:, i, k] = inner[:, k, i] = both
    rows = np.flatnonzero(cancelled & (q0 > 0))
    if rows.size:
        base = np.array(float32_rows(weight, mx.array(rows)), np.float64)
        full = np.stack([base + own.rows(rows) for own in factors], 1)
        inner[rows] = full @ full.transpose(0, 2, 1)
    return RowGrams(
        inner=inner,
        base_norm=np.sqrt(q0),
        recomputed=int(rows.size),
        factors=factors,
    )
