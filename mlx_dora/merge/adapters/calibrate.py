r"""Calibrates adapters of one matrix before a merge, and restores the size after it.

Only directions are calibrated: magnitudes are those of the adapters. A LoRA adapter
gets the lengths of its rows before the calibration.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.finite import all_finite
from mlx_dora.matrix import Adapted, Factors, LowRank, Weight, exact_terms, measured
from mlx_dora.merge.adapters.factored import NOT_FINITE, MergedMatrix, single
from mlx_dora.merge.methods.calibrations import Calibration


def calibrated(
    weight: Weight,
    inputs: Sequence[Adapted],
    shares: np.ndarray,
    calibration: Calibration,
) -> list[Adapted]:
    """Calibrate the updates of the adapters that change this matrix.

    Adapters with weight 0, weights being ``(out, N)``, do not take part.

    Raises:
        DoRAError: If an update is not finite.
    """
    made = list(inputs)
    places = _changing(inputs, shares)
    if len(places) < 2:
        return made
    updates = calibration.function([inputs[i].update.float64() for i in places])
    for i, update in zip(places, updates, strict=True):
        m = inputs[i].m
        if m is None:
            m = measured(weight, inputs[i]).m
        low_rank = LowRank(
            lora_a=inputs[i].update.lora_a, lora_b=single(update.b.T), scale=1.0
        )
        made[i] = Adapted(update=low_rank, m=m)
    return made


def restored(
    merged: MergedMatrix, inputs: Sequence[Adapted], shares: np.ndarray, factor: float
) -> MergedMatrix:
    r"""Restore the size of an update merged after a calibration.

    .. math:: \gamma = \frac{\lambda}{T} \sum_t \lVert s_tB_tA_t\rVert_F \Big/
        \lVert s\,BA\rVert_F

    over the T adapters with an update here (arXiv:2604.16826, section 4.2, with the
    factor λ of the merge, 1 in the paper). The magnitudes stay.
    """
    places = _changing(inputs, shares)
    size = _size(merged.update.float64())
    if not places or not size:
        return merged
    mean = np.mean([_size(inputs[i].update.float64()) for i in places])
    gamma = float(abs(factor) * mean / size)
    return replace(merged, lora_b=merged.lora_b * gamma)


def with_own_lengths(weight: Weight, merged: MergedMatrix) -> MergedMatrix:
    """Set magnitudes to the lengths of the rows W0 + s·BA, keeping signs and zeros."""
    norm = exact_terms(weight, merged.update).norm
    return replace(merged, m=mx.sign(merged.m) * norm)


def _changing(inputs: Sequence[Adapted], shares: np.ndarray) -> list[int]:
    """Positions of the adapters with a weight and an update that is not 0."""
    places = []
    for i, adapted in enumerate(inputs):
        a, b = adapted.update.lora_a, adapted.update.lora_b
        if not (all_finite(a) and all_finite(b)):
            raise DoRAError(NOT_FINITE)
        if shares[:, i].any() and adapted.update.scale and b.size and _any(a) & _any(b):
            places.append(i)
    return places


def _any(values: mx.array) -> bool:
    return bool(mx.any(values != 0))


def _size(update: Factors) -> float:
    """Frobenius norm of an update."""
    return float(np.sqrt(max(float(update.inner(update).sum()), 0.0)))
