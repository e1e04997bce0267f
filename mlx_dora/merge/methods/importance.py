r"""Methods that choose or weigh entries by how much they changed.

Arguments and results are those of `mlx_dora.merge.methods.elementwise`.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_dora.merge.methods import blockwise
from mlx_dora.merge.methods.blockwise import Tensor, changes, sum_of, values
from mlx_dora.merge.methods.elementwise import Blocks
from mlx_dora.merge.methods.settings import TensorSettings
from mlx_dora.merge.methods.sparse import with_elected_sign

# Below these sums mergekit's SCE does not divide.
_NO_ENERGY, _NO_SHARE = 1e-6, 1e-6
# Below this difference mergekit's NearSwap counts entries as this far apart.
_NEAR = 1e-6
# Added to probabilities by mergekit's Arcee Fusion.
_PROBABILITY = 1e-8


def sce(base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings) -> Blocks:
    r"""SCE: select, calculate, erase (arXiv:2408.07990).

    Select the share `select_topk` of the elements whose changes vary most between the
    inputs (by population variance; the first, among equals). Each input's weight is its
    mean square there. Erase the changes against the sign of their sum, and add the
    weighted mean of the rest to the base. In mergekit's definition the inputs have
    equal weights if their mean squares sum to less than 1e-6.
    """
    share = settings.own["select_topk"]
    is_selected = np.ones(0, bool)
    if share < 1:
        is_selected = _most_varied(base, tensors, share)

    def selected(index: slice, deltas: Sequence[mx.array]) -> list[mx.array]:
        if share >= 1:
            return list(deltas)
        mask = mx.array(is_selected[index])
        return [mx.where(mask, delta, 0.0) for delta in deltas]

    flat = [base.reshape(-1), *(tensor.reshape(-1) for tensor in tensors)]
    energies = np.zeros(len(tensors))
    for index in blockwise.slices(base.size):
        blocks = selected(index, changes(index, flat)[1])
        energies += [_square_sum(block) for block in blocks]
    energies /= max(base.size, 1)
    total = float(energies.sum())
    is_equal = total < _NO_ENERGY if settings.as_mergekit else total == 0
    weights = np.ones(len(tensors)) / len(tensors) if is_equal else energies / total

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        start, deltas = changes(index, flat)
        deltas = selected(index, deltas)
        agrees = with_elected_sign(deltas)
        shares = [
            mx.where(agree, float(weight), 0.0)
            for agree, weight in zip(agrees, weights, strict=True)
        ]
        moved = sum_of([a * d for a, d in zip(shares, deltas, strict=True)])
        return start + moved / mx.maximum(sum_of(shares), _NO_SHARE)

    yield from blockwise.parts(block, [base, *tensors])


def _most_varied(base: Tensor, tensors: Sequence[Tensor], share: float) -> np.ndarray:
    """Mark the `share` of the elements that vary most, among those that vary."""
    flat = [base.reshape(-1), *(tensor.reshape(-1) for tensor in tensors)]
    variance = np.empty(base.size, np.float32)
    for index in blockwise.slices(base.size):
        stacked = mx.stack(changes(index, flat)[1])
        variance[index] = np.array(mx.var(stacked, axis=0), copy=False)
    is_selected = np.zeros(base.size, bool)
    kept = int(np.count_nonzero(variance) * share)
    if kept:
        place = variance.size - kept
        least = np.partition(variance, place)[place]
        is_selected = variance > least
        equal = np.flatnonzero(variance == least)
        is_selected[equal[: kept - int(np.count_nonzero(is_selected))]] = True
    return is_selected


def _square_sum(block: mx.array) -> float:
    return float(np.square(np.array(block, copy=False), dtype=np.float64).sum())


def nearswap(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Blocks:
    r"""NearSwap: move to the other model where both are close.

    .. math:: W_0 + \min\Bigl(\frac{t}{|W_1 - W_0|}, 1\Bigr)\,(W_1 - W_0)

    so a change of at most t is taken whole, and a larger one is cut to t
    (mergekit; alchemonaut/QuartetAnemoi-70B).
    """
    t = settings.own["t"]

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        first, second = values(index, flat)
        apart = mx.maximum(mx.abs(first - second), _NEAR)
        share = mx.clip(t / apart, 0.0, 1.0)
        return share * second + (1 - share) * first

    yield from blockwise.parts(block, [base, *tensors])


def arcee_fusion(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Blocks:
    r"""Arcee Fusion: take over the changes of outstanding importance.

    .. math:: I_{jk} = |W_1 - W_0|_{jk} \; \mathrm{KL}\bigl(\operatorname{softmax}
        W_{1,j} \,\|\, \operatorname{softmax} W_{0,j}\bigr)

    for row j. Entries with I of at least the median plus 1.5 times the interquartile
    range are taken from the second model (mergekit). Quartiles are exact here; mergekit
    estimates those of more than a million entries on a random sample. The importance,
    float32, is held in memory.
    """
    (other,) = tensors
    width = base.shape[-1] if base.ndim else 1
    importance = np.empty(base.size, np.float32)
    step = blockwise.row_step(base)
    pair = [base.reshape(-1), other.reshape(-1)]
    for index in blockwise.slices(base.size, step):
        first, second = (
            np.array(block).reshape(-1, width).astype(np.float64)
            for block in values(index, pair)
        )
        p, q = (_softmax(rows) + _PROBABILITY for rows in (second, first))
        divergence = (p * np.log(p / q)).sum(1, keepdims=True)
        importance[index] = (np.abs(second - first) * divergence).ravel()
    least = _outstanding(importance)

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        first, second = values(index, flat)
        return mx.where(mx.array(importance[index]) >= least, second, first)

    yield from blockwise.parts(block, pair)


def _softmax(rows: np.ndarray) -> np.ndarray:
    powers = np.exp(rows - rows.max(1, keepdims=True, initial=-np.inf))
    return powers / powers.sum(1, keepdims=True)


def _outstanding(importance: np.ndarray) -> float:
    """The median plus 1.5 interquartile ranges."""
    if not importance.size:
        return 0.0
    places = [int(share * (importance.size - 1)) for share in (0.25, 0.5, 0.75)]
    low, middle, high = np.partition(importance, places)[places].astype(np.float64)
    return float(np.float32(middle + 1.5 * (high - low)))
