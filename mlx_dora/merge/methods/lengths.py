r"""Rules for the magnitudes of merged adapters, apart from the directions.

.. math:: m_j = \lVert W_{0j}\rVert + R(\Delta m_{1j}, \dots, \Delta m_{Nj}), \qquad
    \Delta m_{ij} = |m_{ij}| - \lVert W_{0j}\rVert

No paper on merging treats magnitudes: these rules are ours. A LoRA adapter has the
lengths of its rows as magnitudes.

A function gets the lengths and the density of the merge (None for the default), and
returns the merged lengths, shape ``(out,)``. Its entry is in
`mlx_dora.merge.methods.magnitudes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods import METHODS, MergeMethod
from mlx_dora.merge.methods.blockwise import joined
from mlx_dora.merge.methods.magnitudes import rule_named
from mlx_dora.merge.methods.settings import TensorSettings


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The lengths of the rows of N adapters over one base, float64.

    Attributes:
        base: ‖W0‖ of each row. Shape ``(out,)``.
        inputs: Length that each adapter gives its row; negative if it reverses the
            row. Shape ``(out, N)``.
        weights: Weights of the adapters. Shape ``(out, N)``.
        own: Length of the merged, unnormalized direction. Shape ``(out,)``.
    """

    base: np.ndarray
    inputs: np.ndarray
    weights: np.ndarray
    own: np.ndarray

    @property
    def moved(self) -> np.ndarray:
        """Δm of each adapter. Shape ``(out, N)``."""
        return np.abs(self.inputs) - self.base[:, None]

    @property
    def sign(self) -> np.ndarray:
        """Sign of the merged magnitude: -1 where most weight is on reversed rows."""
        votes = (np.abs(self.weights) * np.where(self.inputs < 0, -1.0, 1.0)).sum(1)
        return np.where(votes < 0, -1.0, 1.0)


def signed_lengths(
    norm: np.ndarray, magnitudes: Sequence[mx.array | None]
) -> np.ndarray:
    """Lengths that adapters give their rows; 0 for rows W0 + sBA of length 0.

    Args:
        norm: ‖W0 + sBA‖ of each adapter, which is also LoRA's magnitude. Shape
            ``(out, N)``.
        magnitudes: Magnitudes of each adapter, ``(out,)``; None for LoRA.

    Returns:
        Shape ``(out, N)``, negative where an adapter reverses the row.
    """
    columns = [
        norm[:, i] if m is None else np.array(m.astype(mx.float32), np.float64)
        for i, m in enumerate(magnitudes)
    ]
    return np.where(norm > 0, np.stack(columns, axis=1), 0.0)


def ruled(rule: str, lengths: Lengths, density: float | None = None) -> np.ndarray:
    """Merge lengths by a rule; rows of the merged direction that are 0 get 0.

    Returns:
        Lengths of at least 0, shape ``(out,)``, float64.
    """
    size = rule_named(rule).function(lengths, density)
    return np.where(lengths.own > 0, np.maximum(size, 0.0), 0.0)


@dataclass(frozen=True, kw_only=True)
class LengthRule:
    """A rule with its settings.

    Attributes:
        name: Name in `mlx_dora.merge.methods.magnitudes`.
        density: Fraction of the changes to keep; None for the default.
        weights: Weights of the adapters, if they differ from those of the directions.
            Shape ``(out, N)``.
    """

    name: str
    density: float | None = None
    weights: np.ndarray | None = None

    def merged(
        self, base: np.ndarray, inputs: np.ndarray, weights: np.ndarray, own: np.ndarray
    ) -> np.ndarray:
        """Merge lengths, given as in `Lengths`. Shape ``(out,)``."""
        weights = weights if self.weights is None else self.weights
        lengths = Lengths(base=base, inputs=inputs, weights=weights, own=own)
        return ruled(self.name, lengths, self.density)


def merged_magnitude(
    entry: MergeMethod, lengths: Lengths, settings: TensorSettings, rule: str | None
) -> np.ndarray:
    """Merge magnitudes by a rule; without one, Δm by the block method of directions.

    Returns:
        Magnitudes, shape ``(out,)``, float64. Most weight decides the sign.
    """
    if rule is not None:
        density = settings.density[0] if settings.density else None
        return lengths.sign * ruled(rule, lengths, density)
    size = np.maximum(by_method(entry, lengths, settings), 0.0)
    return np.where(lengths.own > 0, lengths.sign * size, 0.0)


def by_method(
    entry: MergeMethod, lengths: Lengths, settings: TensorSettings
) -> np.ndarray:
    """Merge Δm, as one vector, by a block method. Shape ``(out,)``."""
    moved = lengths.moved.astype(np.float32)
    base = mx.zeros(lengths.base.shape, mx.float32)
    columns = [mx.array(np.ascontiguousarray(column)) for column in moved.T]
    merged = joined(entry.block_function(base, columns, settings), base.shape)
    return lengths.base + np.array(merged, np.float64)


def mean(lengths: Lengths, density: float | None) -> np.ndarray:
    r"""Weighted mean change, :math:`\sum_i w_i\Delta m_i / \sum_i |w_i|`."""
    total = np.abs(lengths.weights).sum(1)
    moved = (lengths.weights * lengths.moved).sum(1)
    return lengths.base + moved / np.where(total > 0, total, 1.0)


def mover(lengths: Lengths, density: float | None) -> np.ndarray:
    r"""Change of the adapter with the largest :math:`|w_i\Delta m_i|` in each row.

    A negative weight takes the change away.
    """
    furthest = np.abs(lengths.weights * lengths.moved).argmax(1)[:, None]
    change = np.sign(lengths.weights) * lengths.moved
    return lengths.base + np.take_along_axis(change, furthest, axis=1)[:, 0]


def ties(lengths: Lengths, density: float | None) -> np.ndarray:
    """TIES on Δm as one vector, at the density of the merge or TIES's own.

    Raises:
        DoRAError: If weights differ by row.
    """
    entry = METHODS["ties"]
    if np.ptp(lengths.weights, axis=0).any():
        raise DoRAError(
            "magnitudes ties needs one weight per adapter, not one per row."
        )
    share = entry.density if density is None else density
    settings = TensorSettings(
        weights=lengths.weights, density=(share or 0.0,) * lengths.weights.shape[1]
    )
    return by_method(entry, lengths, settings)


def base(lengths: Lengths, density: float | None) -> np.ndarray:
    """The base's lengths: no change."""
    return lengths.base


def own(lengths: Lengths, density: float | None) -> np.ndarray:
    """The merged direction's own length, so that W' = W0 + s·BA as in LoRA."""
    return lengths.own
