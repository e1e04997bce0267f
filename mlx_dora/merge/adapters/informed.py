r"""Fisher merging of one adapted matrix: factored by row, dense by element.

.. math:: W'_{jk} = \frac{\sum_i w_i F_{ijk} W'_{ijk}}{\sum_i w_i F_{ijk}}

With one number per row this is a weighted mean of rows, under which adapters are closed
(`mlx_dora.merge.adapters.factored`). With one number per element they are not closed:
the dense merged matrix is built and its direction is factored by a truncated SVD.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.matrix import Adapted, Weight, row_gain
from mlx_dora.matrix.weight import dense
from mlx_dora.merge.adapters.dense import factor, row_norm
from mlx_dora.merge.adapters.factored import MergedMatrix, merge_matrix
from mlx_dora.merge.fisher.information import informed_weights
from mlx_dora.merge.methods import elementwise

# Where the shares of W0 cancel to less than this, the merged row is too far from W0.
_LEANS = 0.1


def merge_informed(
    weight: Weight,
    inputs: Sequence[Adapted],
    weights: np.ndarray,
    informations: Sequence[mx.array | None],
    *,
    scale: float,
    rank: int | None = None,
) -> MergedMatrix:
    """Merge the adapters of one matrix by their Fisher information.

    Args:
        weight: Base weight. Shape ``(out, in)``, any float dtype or packed.
        inputs: The N adapters.
        weights: Weights, shape ``(out, N)``; each row sums to 1.
        informations: Fisher information of each adapter, all ``(out,)`` or all
            ``(out, in)``. If any is None, only the weights count.
        scale: Multiplier of the merged adapter; not 0.
        rank: Maximum rank of the update; None for the sum of the inputs' ranks.

    Returns:
        The merged adapter. Elements for which no input has information are merged by
        the weights, and counted in `MergedMatrix.unknown`.

    Raises:
        DoRAError: If weights by row are combined with information by element.
    """
    known = [information for information in informations if information is not None]
    if len(known) < len(informations) or known[0].ndim == 1:
        informed, unknown = informed_weights(weights, informations)
        merged = merge_matrix(
            weight, inputs, informed, method="linear", scale=scale, rank=rank
        )
        return replace(merged, unknown=unknown * weight.shape[1])
    if np.ptp(weights, axis=0).any():
        raise DoRAError(
            "Fisher information by element needs one weight per adapter, not one per "
            "row."
        )
    return _by_element(weight, inputs, weights, known, scale, rank)


def _by_element(
    weight: Weight,
    inputs: Sequence[Adapted],
    weights: np.ndarray,
    known: Sequence[mx.array],
    scale: float,
    rank: int | None,
) -> MergedMatrix:
    base = dense(weight).astype(mx.float32)
    rows, gains = [], []
    for adapted in inputs:
        update = adapted.update
        row = base + update.rows(slice(None))
        norm = row_norm(row)
        length = norm if adapted.m is None else adapted.m.astype(mx.float32)
        gain = row_gain(length, norm)
        rows.append(gain[:, None] * row)
        gains.append(np.array(gain, np.float64))
    merged = elementwise.fisher(rows, known, [float(w) for w in weights[0]])
    unknown = int((sum(known[1:], start=known[0]) == 0).sum())
    # Estimate W0's share of each row from the mean information. Divided by it, the row
    # is W0 plus an update of about the inputs' ranks.
    informed, _ = informed_weights(weights, [array.mean(axis=1) for array in known])
    parts = informed * np.stack(gains, axis=1)
    share, size = parts.sum(1), np.abs(parts).sum(1)
    magnitude = row_norm(merged)
    length = np.array(row_norm(base) / mx.maximum(magnitude, 1e-30), np.float64)
    is_plain = share > _LEANS * size
    factors = np.where(is_plain, 1 / np.where(is_plain, share, 1.0), length)
    total = sum(adapted.update.lora_a.shape[1] for adapted in inputs)
    made = factor(
        base,
        mx.array(factors[:, None].astype(np.float32)) * merged,
        magnitude,
        scale=scale,
        rank=rank or max(total, 1),
        rescale=False,
    )
    return replace(made, unknown=unknown)
