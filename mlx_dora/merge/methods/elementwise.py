r"""Methods that merge dense tensors element by element or matrix by matrix.

Each method accepts the base (None if the method does not use it), N tensors of the same
shape and their settings. It returns the merged float32 tensor as consecutive flat
blocks that are not yet evaluated, which keeps memory use low. Task vectors are the
changes :math:`\tau_i = W_i - W_0`. Methods that mergekit also has follow its definition
(compared with mergekit in ``tests/merge``). Those that drop entries are in
`mlx_dora.merge.methods.sparse`.
"""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods import blockwise
from mlx_dora.merge.methods.blockwise import Tensor, changes, weighted_sum
from mlx_dora.merge.methods.settings import TensorSettings

# Singular values below this share of the largest are rounding errors. Including their
# vectors in the orthogonalization would only blur those of the other tasks.
_TSV_NOISE = 1e-5

Blocks = Iterator[mx.array]
Thinning = Callable[[slice, Sequence[mx.array]], list[mx.array]]
"""(position, blocks of the changes) -> the blocks with some entries set to 0."""


def linear(
    base: Tensor | None, tensors: Sequence[Tensor], settings: TensorSettings
) -> Blocks:
    r"""Weighted mean, :math:`\sum_i w_i W_i / \sum_i w_i` (arXiv:2203.05482).

    Raises:
        DoRAError: If the weights sum to 0 but must be normalized.
    """
    weights = settings.plain_weights()
    total = _divisor(weights) if settings.normalizes(True) else 1.0

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        # Sum first, then divide once: rounds as mergekit does.
        return weighted_sum(blockwise.values(index, flat), weights) / total

    return blockwise.parts(block, tensors)


def task_arithmetic(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Blocks:
    r"""Task arithmetic, :math:`W_0 + \lambda\sum_i w_i\tau_i` (arXiv:2212.04089)."""
    return summed(base, tensors, settings)


def tsv(base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings) -> Blocks:
    r"""TSV-Merge: keep some singular vectors of each task and make them orthogonal.

    Each :math:`w_i\tau_i` keeps its min(out, in) / N largest singular triples; N counts
    the inputs whose weight is not 0. The concatenated vectors of all tasks are replaced
    by the nearest orthonormal vectors (Procrustes: :math:`U \to P Q^\top` for
    :math:`U = P\Sigma Q^\top`). The result is
    :math:`W_0 + \lambda \hat U \hat\Sigma \hat V^\top` (arXiv:2412.00081). Tensors that
    are not matrices get the weighted mean of the task vectors, times λ. All tensors are
    held in memory.
    """
    if base.ndim != 2:
        yield from summed(base, tensors, settings, normalize=True)
        return
    start, *others = (
        np.array(blockwise.held(tensor).astype(mx.float32), np.float64)
        for tensor in (base, *tensors)
    )
    pairs = zip(others, settings.plain_weights(), strict=True)
    used = [(other, weight) for other, weight in pairs if weight]
    share = max(1, min(start.shape) // max(len(used), 1))
    lefts, sizes, rights = [], [], []
    for other, weight in used:
        u, s, v = np.linalg.svd(weight * (other - start), full_matrices=False)
        kept = min(share, int((s > _TSV_NOISE * s[0]).sum()))
        lefts.append(u[:, :kept])
        sizes.append(s[:kept])
        rights.append(v[:kept].T)
    merged = start
    if any(values.size for values in sizes):  # not if all weights are 0
        u, v = (_orthonormal(np.concatenate(part, axis=1)) for part in (lefts, rights))
        merged = start + settings.scale * (u * np.concatenate(sizes)) @ v.T
    yield mx.array(merged.astype(np.float32)).reshape(-1)


def fisher(
    tensors: Sequence[mx.array],
    fishers: Sequence[mx.array],
    weights: Sequence[float],
) -> tuple[mx.array, int]:
    r"""Fisher-weighted mean, element by element (arXiv:2111.09832).

    .. math:: \frac{\sum_i w_i F_i \circ W_i}{\sum_i w_i F_i}

    where F is the diagonal Fisher information. Where every F is 0, the result is the
    weighted mean.

    Returns:
        The merged tensor, evaluated, and the number of elements without information.
    """
    count, total = len(tensors), _divisor(weights)

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        every = blockwise.values(index, flat)
        known = weighted_sum(every[count:], weights)
        products = [a * b for a, b in zip(every[:count], every[count:], strict=True)]
        mean = weighted_sum(every[:count], weights) / total
        merged = weighted_sum(products, weights) / mx.where(known > 0, known, 1.0)
        return mx.where(known > 0, merged, mean)

    blocks = blockwise.parts(block, [*tensors, *fishers])
    unknown = int((sum(fishers[1:], start=fishers[0]) == 0).sum())
    return blockwise.joined(blocks, tensors[0].shape), unknown


def summed(
    base: Tensor,
    tensors: Sequence[Tensor],
    settings: TensorSettings,
    *,
    thin: Thinning | None = None,
    normalize: bool = False,
    step: int | None = None,
) -> Blocks:
    """The base plus the weighted sum of the changes, maybe thinned.

    `normalize` is the default of the setting; blocks have `step` elements.
    """
    weights, total = settings.plain_weights(), sum(settings.plain_weights())
    normalize = (settings.normalizes(False) or normalize) and abs(total) >= 1e-8
    factor = settings.scale / (total if normalize else 1.0)

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        start, deltas = changes(index, flat)
        if thin is not None:
            deltas = thin(index, deltas)
        return start + weighted_sum(deltas, weights) * factor

    return blockwise.parts(block, [base, *tensors], step)


def _divisor(weights: Sequence[float]) -> float:
    total = sum(weights)
    if abs(total) < 1e-8:
        raise DoRAError(
            f"the weights {list(weights)} sum to 0 and cannot be normalized."
        )
    return total


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(columns, full_matrices=False)
    return left @ right
