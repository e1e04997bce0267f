r"""Merges the adapters of one matrix through a dense weight.

Adapters are not closed under methods that work element by element. Fisher information
by element is such a method:

.. math:: W'_{jk} = \frac{\sum_i w_i F_{ijk} W'_{ijk}}{\sum_i w_i F_{ijk}}

With one number per row, it is a weighted mean of rows, under which adapters are closed
(`mlx_dora.merge.adapters.factored`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.finite import all_finite
from mlx_dora.matrix import Adapted, Weight, row_gain
from mlx_dora.matrix.weight import dense
from mlx_dora.merge.adapters.factor import factor, row_norm
from mlx_dora.merge.adapters.factored import (
    NOT_FINITE,
    MergedMatrix,
    merge_matrix,
    single,
)
from mlx_dora.merge.fisher.information import informed_weights
from mlx_dora.merge.methods import METHODS, MergeMethod, elementwise
from mlx_dora.merge.methods.blockwise import joined
from mlx_dora.merge.methods.calibrations import calibration_named
from mlx_dora.merge.methods.lengths import (
    LengthRule,
    Lengths,
    merged_magnitude,
    signed_lengths,
)
from mlx_dora.merge.methods.magnitudes import rule_named
from mlx_dora.merge.methods.settings import TensorSettings, check_seed
from mlx_dora.merge.methods.spaces import space_named

# Where the shares of W0 cancel to less than this, the merged row is too far from W0.
_LEANS = 0.1


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of element-wise methods, besides the weights.

    Attributes:
        density: Fraction of the entries to keep; None for the method's default.
        seed: Random seed of DARE.
        scale: λ on the merged task vectors.
        own: Parameters that only the method has, by name, for all adapters.
        space: Space of `mlx_dora.merge.methods.spaces` to merge in; None for the
            method's own.
        magnitudes: Rule of `mlx_dora.merge.methods.lengths`; None for the method's
            own.
        calibrate: Calibration of `mlx_dora.merge.methods.calibrations` before the
            merge; None for none.
    """

    density: float | None = None
    seed: int = 0
    scale: float = 1.0
    own: Mapping[str, float] = field(default_factory=dict)
    space: str | None = None
    magnitudes: str | None = None
    calibrate: str | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not math.isfinite(self.scale):
            raise DoRAError(f"scale must be a finite number, got {self.scale!r}.")
        if self.space is not None:
            space_named(self.space)
        if self.magnitudes is not None:
            rule_named(self.magnitudes)
        if self.calibrate is not None:
            calibration_named(self.calibrate)

    def given(self) -> list[str]:
        """Names of the settings that differ from their defaults."""
        density = ["density"] if self.density is not None else []
        return [*density, *(["lambda"] if self.scale != 1 else []), *self.own]

    def beside_rule(self) -> list[str]:
        """Those of `given` that the rule for magnitudes does not use."""
        used = () if self.magnitudes is None else rule_named(self.magnitudes).parameters
        return [name for name in self.given() if name not in used]

    def rule(self, weights: np.ndarray | None = None) -> LengthRule | None:
        """The chosen rule for magnitudes, with weights of its own ``(out, N)``."""
        if self.magnitudes is None:
            return None
        return LengthRule(name=self.magnitudes, density=self.density, weights=weights)

    @property
    def named(self) -> dict[str, str]:
        """The choices by name that were made, for reports."""
        choices = {
            "space": self.space,
            "magnitudes": self.magnitudes,
            "calibrate": self.calibrate,
        }
        return {name: value for name, value in choices.items() if value is not None}


def plain_weights(method: str, shares: np.ndarray) -> list[float]:
    """One weight per adapter, from weights ``(out, N)``.

    Raises:
        DoRAError: If weights differ by row.
    """
    if np.ptp(shares, axis=0).any():
        raise DoRAError(f"{method} needs one weight per adapter, not one per row.")
    return [float(share) for share in shares[0]]


def tensor_settings(
    entry: MergeMethod, weights: Sequence[float], options: Options
) -> TensorSettings:
    """Settings of a method for one matrix, from those of the merge."""
    count = len(weights)
    density = entry.density if options.density is None else options.density
    return TensorSettings(
        weights=np.array(weights, np.float64),
        density=None if density is None else (density,) * count,
        seed=options.seed,
        scale=options.scale,
        own=entry.own_values(count, lambda name, _: options.own.get(name)),
    )


def merge_dense(
    weight: Weight,
    inputs: Sequence[Adapted],
    shares: np.ndarray,
    *,
    method: str,
    scale: float,
    rank: int | None,
    options: Options,
) -> MergedMatrix:
    """Merge the adapters of one matrix by a method that works on dense tensors.

    Arguments are those of `mlx_dora.merge.adapters.factored.merge_matrix`, and the
    method's settings.

    Raises:
        DoRAError: If weights differ by row, or an adapted row is not finite.
    """
    weights = plain_weights(method, shares)
    base, rows, magnitudes = _dense_rows(weight, inputs)
    direction, magnitude = merge_apart(method, base, rows, magnitudes, weights, options)
    rank = rank or _total_rank(inputs)
    return factor(base, direction, magnitude, scale=scale, rank=rank, rescale=False)


def merge_informed(
    weight: Weight,
    inputs: Sequence[Adapted],
    weights: np.ndarray,
    informations: Sequence[mx.array | None],
    *,
    scale: float,
    rank: int | None = None,
    options: Options | None = None,
) -> MergedMatrix:
    """Merge the adapters of one matrix by their Fisher information.

    Other arguments are those of `mlx_dora.merge.adapters.factored.merge_matrix`.
    `informations` holds the information of each adapter, all ``(out,)`` or all
    ``(out, in)``. If any is None, only the weights count.

    Returns:
        The merged adapter. Elements for which no input has information are merged by
        the weights, and counted in `MergedMatrix.unknown`.

    Raises:
        DoRAError: If weights by row are combined with information by element.
    """
    options = options or Options()
    known = [information for information in informations if information is not None]
    if len(known) < len(informations) or known[0].ndim == 1:
        informed, unknown = informed_weights(weights, informations)
        merged = merge_matrix(
            weight,
            inputs,
            informed,
            method="linear",
            scale=scale,
            rank=rank,
            rule=options.rule(weights),
        )
        return replace(merged, unknown=unknown * weight.shape[1])
    if np.ptp(weights, axis=0).any():
        raise DoRAError(
            "Fisher information by element needs one weight per adapter, not one per "
            "row."
        )
    rank = rank or _total_rank(inputs)
    return _merge_by_element(weight, inputs, weights, known, options, scale, rank)


def _merge_by_element(
    weight: Weight,
    inputs: Sequence[Adapted],
    weights: np.ndarray,
    known: Sequence[mx.array],
    options: Options,
    scale: float,
    rank: int,
) -> MergedMatrix:
    """Merge by Fisher information ``(out, in)``, as `merge_informed` describes."""
    base, rows, magnitudes = _dense_rows(weight, inputs)
    norms = [row_norm(row) for row in rows]
    gains = [row_gain(m, norm) for m, norm in zip(magnitudes, norms, strict=True)]
    rows = [gain[:, None] * row for gain, row in zip(gains, rows, strict=True)]
    merged, unknown = elementwise.fisher(rows, known, [float(w) for w in weights[0]])
    # Estimate W0's share of each row from the mean information. Divided by it, the row
    # is W0 plus an update of about the inputs' ranks.
    informed, _ = informed_weights(weights, [array.mean(axis=1) for array in known])
    parts = informed * np.stack([np.array(g, np.float64) for g in gains], axis=1)
    share, size = parts.sum(1), np.abs(parts).sum(1)
    base_norm, magnitude = row_norm(base), row_norm(merged)
    length = np.array(base_norm / mx.maximum(magnitude, 1e-30), np.float64)
    is_plain = share > _LEANS * size
    factors = np.where(is_plain, 1 / np.where(is_plain, share, 1.0), length)
    if (rule := options.rule()) is not None:
        signed = signed_lengths(np.stack(norms, axis=1), magnitudes)
        own = np.abs(factors) * np.array(magnitude, np.float64)
        base_norm = np.array(base_norm, np.float64)
        magnitude = single(rule.merged(base_norm, signed, weights, own))
    made = factor(
        base,
        mx.array(factors[:, None].astype(np.float32)) * merged,
        magnitude,
        scale=scale,
        rank=max(rank, 1),
        rescale=False,
    )
    return replace(made, unknown=unknown)


def _dense_rows(
    weight: Weight, inputs: Sequence[Adapted]
) -> tuple[mx.array, list[mx.array], list[mx.array]]:
    """W0 in float32, and the rows W0 + s·BA and magnitudes of each input."""
    base = dense(weight).astype(mx.float32)
    rows, magnitudes = [], []
    for adapted in inputs:
        rows.append(base + adapted.update.rows(slice(None)))
        if not all_finite(rows[-1]):
            raise DoRAError(NOT_FINITE)
        magnitudes.append(row_norm(rows[-1]) if adapted.m is None else adapted.m)
    return base, rows, magnitudes


def _total_rank(inputs: Sequence[Adapted]) -> int:
    return sum(adapted.update.rank for adapted in inputs)


def merge_apart(
    method: str,
    base: mx.array,
    directions: Sequence[mx.array],
    magnitudes: Sequence[mx.array],
    weights: Sequence[float],
    options: Options,
) -> tuple[mx.array, mx.array]:
    r"""Merge directions and magnitudes separately by the same element-wise method.

    The directions' task vectors are :math:`V_i - W_0` and the magnitudes'
    :math:`|m_i| - \lVert W_0\rVert`, so a sign
    conflict in one does not affect the other.

    The directions, each ``(out, in)``, are about as long as the rows of the base.

    Returns:
        The unnormalized direction, ``(out, in)``, and the magnitude, ``(out,)``.

    Raises:
        DoRAError: If the density is not between 0 and 1.
    """
    entry = METHODS[method]
    settings = tensor_settings(entry, weights, options)
    direction = joined(entry.block_function(base, directions, settings), base.shape)
    base_norm, own, *norms = (
        np.array(row_norm(rows), np.float64) for rows in (base, direction, *directions)
    )
    lengths = Lengths(
        base=base_norm,
        inputs=signed_lengths(np.stack(norms, axis=1), magnitudes),
        weights=np.broadcast_to(settings.weights, (len(own), len(norms))),
        own=own,
    )
    merged = merged_magnitude(entry, lengths, settings, options.magnitudes)
    return direction, single(merged)
