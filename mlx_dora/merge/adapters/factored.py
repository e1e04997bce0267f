r"""Merges DoRA adapters of one matrix without building a dense weight.

.. math:: \sum_i \beta_i (W_0 + s_i B_i A_i) = c \, \Bigl(W_0 + \sum_i
    \frac{\beta_i s_i}{c} B_i A_i\Bigr), \qquad c = \sum_i \beta_i

DoRA divides each row by its length, so the merged row is W0 plus one update of rank
Σ r_i, with the sign of c in its magnitude: DoRA adapters are closed under every method
of `mlx_dora.merge.methods.rows`, exactly (``docs/merging.md``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.matrix import Adapted, Factors, LowRank, RowGrams, Weight, row_grams
from mlx_dora.matrix.low_rank import side_by_side
from mlx_dora.matrix.weight import float32_rows
from mlx_dora.merge.methods import METHODS
from mlx_dora.merge.methods.lengths import LengthRule
from mlx_dora.merge.methods.rows import Combination, Rows, heaviest, of_changes

# Where the β cancel to less than this share, W0 drops out of the sum and W0 + BA cannot
# express the row.
_BASE_SHARE = 1e-3
NOT_FINITE = (
    "the adapted rows are not finite: the base holds NaN or inf, or an adapter's "
    "values are too large for float32."
)


@dataclass(frozen=True, kw_only=True)
class MergedMatrix:
    """The merged adapter of one matrix, with counts of special cases.

    Attributes:
        lora_a: Down projection A, shape ``(in, r)``, float32.
        lora_b: Up projection B, shape ``(r, out)``, float32.
        m: Magnitudes, shape ``(out,)``, float32.
        scale: Multiplier of the update.
        opposed: Number of rows whose directions cancel; they keep the direction of
            the input with the largest weight.
        recomputed: Number of rows computed densely, because their factored sum is
            lost in rounding.
        zero: Number of rows that are zero after the merge.
        discarded: Share of the update's energy lost by cutting the rank.
        unknown: Number of elements without Fisher information, in a Fisher merge.
    """

    lora_a: mx.array
    lora_b: mx.array
    m: mx.array
    scale: float
    opposed: int = 0
    recomputed: int = 0
    zero: int = 0
    discarded: float = 0.0
    unknown: int = 0

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.lora_a.shape[1]

    @property
    def update(self) -> LowRank:
        """The update s·BA."""
        return LowRank(lora_a=self.lora_a, lora_b=self.lora_b, scale=self.scale)

    @property
    def tensors(self) -> dict[str, mx.array]:
        """A, B and m, by their names in an adapter."""
        return {"lora_a": self.lora_a, "lora_b": self.lora_b, "m": self.m}


def merge_matrix(
    weight: Weight,
    inputs: Sequence[Adapted],
    weights: np.ndarray,
    *,
    method: str,
    scale: float,
    rank: int | None = None,
    rule: LengthRule | None = None,
) -> MergedMatrix:
    """Merge the adapters of one matrix by a row method.

    The base weight ``(out, in)`` is read once. The inputs' weights are ``(out, N)``;
    for means each row sums to 1. `scale`, not 0, is the merged adapter's multiplier.
    `rule` merges their lengths; None for the method's own rule.

    Raises:
        DoRAError: If the base holds NaN or inf, or an adapted row overflows float32.

    Returns:
        The merged adapter: exact to float32 precision, except for a cut to `rank`.
        Inputs with the same A share it.
    """
    entry, inputs, given = METHODS[method], list(inputs), weights
    of_base = entry.base == "changes"
    if of_base:  # W0 + Σ β_i (W_i − W0): the base is the last of the rows
        inputs.append(_unchanged(weight))
        weights = np.concatenate([weights, 1 - weights.sum(1, keepdims=True)], axis=1)
    grams = row_grams(weight, [adapted.update for adapted in inputs])
    rows = _rows(grams, inputs, weights)
    function = entry.row_function
    combination = of_changes(rows, function) if of_base else function(rows)
    beta, opposed = _keep_base(combination, rows.norm, weights)
    length, share = combination.length.copy(), beta.sum(1)
    # The row is zero in all inputs: use any update that leaves it zero.
    is_zero = np.abs(beta).sum(1) == 0
    beta = np.where(is_zero[:, None], heaviest(weights), beta)
    share = np.where(is_zero, 1.0, share)
    shares = beta / share[:, None]
    pairs = enumerate(grams.factors)
    merged = side_by_side(
        [Factors(a=own.a, b=shares[:, i : i + 1] * own.b) for i, own in pairs]
    )
    if recomputed := np.flatnonzero(combination.cancelled & ~opposed).tolist():
        dense = np.array(float32_rows(weight, mx.array(recomputed)), np.float64)
        dense = dense + merged.rows(np.array(recomputed))
        length[recomputed] = np.linalg.norm(share[recomputed, None] * dense, axis=1)
    gain = np.where(is_zero, 1.0, np.abs(share))
    if rule is not None:
        own = length / gain  # of W0 + BA
        inputs_only = _signed(rows)[:, : given.shape[1]]
        length = rule.merged(grams.base_norm, inputs_only, given, own)
        gain = gains(length, own)
    merged, discarded = cut(merged, rank, gain)
    return MergedMatrix(
        lora_a=single(merged.a),
        lora_b=single((merged.b / scale).T),
        m=single(np.sign(share) * length),
        scale=scale,
        opposed=int(opposed.sum()),
        recomputed=grams.recomputed + len(recomputed),
        zero=int((length == 0).sum()),
        discarded=discarded,
    )


def cut(update: Factors, rank: int | None, gain: np.ndarray) -> tuple[Factors, float]:
    """Cut an update to a rank, if it is larger, by the error of its rows times `gain`.

    Returns:
        The update, and the lost share of the squared norm.

    Raises:
        DoRAError: If the update is not finite.
    """
    if rank is None or rank >= update.a.shape[1]:
        return update, 0.0
    if not (np.isfinite(update.a).all() and np.isfinite(update.b).all()):
        raise DoRAError(NOT_FINITE)
    return update.cut(rank, gain)


def _signed(rows: Rows) -> np.ndarray:
    """Magnitudes of the inputs, 0 for zero rows. Shape ``(rows, N)``."""
    return np.where(rows.norm > 0, rows.magnitude, 0.0)


def _rows(grams: RowGrams, inputs: Sequence[Adapted], weights: np.ndarray) -> Rows:
    """The rows of the inputs, as a method sees them; refuses rows beyond float32."""
    norm = grams.norm
    if not (norm <= np.finfo(np.float32).max).all():
        raise DoRAError(NOT_FINITE)
    lengths = [
        norm[:, i] if adapted.m is None else np.array(adapted.m, np.float64)
        for i, adapted in enumerate(inputs)
    ]
    return Rows(
        inner=grams.inner,
        magnitude=np.stack(lengths, axis=1),
        weights=weights,
        base_norm=grams.base_norm,
    )


def _unchanged(weight: Weight) -> Adapted:
    """The base as an input: an update of rank 0."""
    out, width = weight.shape
    nothing = LowRank(lora_a=mx.zeros((width, 0)), lora_b=mx.zeros((0, out)), scale=0.0)
    return Adapted(update=nothing, m=None)


def single(values: np.ndarray) -> mx.array:
    """Cast to float32; values beyond its range become inf, which callers refuse."""
    with np.errstate(over="ignore"):
        return mx.array(np.ascontiguousarray(values).astype(np.float32))


def _keep_base(
    combination: Combination, norm: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where W0 cancels out, keep the direction of the input with the largest weight."""
    beta, length = combination.coefficients, combination.length
    size = np.abs(beta).sum(1)
    lost = (np.abs(beta.sum(1)) <= _BASE_SHARE * size) & (size > 0)
    if lost.any():
        chosen = heaviest(np.abs(weights) * (norm > 0))
        reach = np.where(norm > 0, length[:, None] / np.where(norm > 0, norm, 1), 0.0)
        beta = np.where(lost[:, None], chosen * reach, beta)
    return beta, combination.opposed | lost


def gains(m: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weight of each row's error: |m| over the direction's length; positive."""
    gain = np.where(target > 0, np.abs(m) / np.where(target > 0, target, 1.0), 1.0)
    return np.maximum(gain, 1e-6 * max(float(gain.max()), 1e-30))
