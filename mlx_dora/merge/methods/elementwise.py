r"""Methods that merge dense tensors element by element or matrix by matrix.

Each method accepts the base (None if the method does not use it), N tensors of the same
shape and their settings. It returns the merged float32 tensor as consecutive flat
blocks that are not yet evaluated, which keeps memory use low. Task vectors are the
changes :math:`\tau_i = W_i - W_0`. Methods that mergekit also has follow its definition
(compared with mergekit in ``tests/merge``).
"""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods import blockwise
from mlx_dora.merge.methods.blockwise import Tensor, changes, sum_of, weighted_sum
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
    return _summed(base, tensors, settings)


def ties(base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings) -> Blocks:
    r"""TIES: trim, elect the sign, average those that agree (arXiv:2306.01708).

    Each task vector keeps its `density` largest entries (the first, among equals). The
    sign of :math:`\sum_i w_i\tau_i` is elected for each element. The weighted mean of
    the entries with that sign, times λ, is added to W0.
    """
    pairs = zip(tensors, settings.densities(), strict=True)
    cuts = [_cut_of(base, tensor, density) for tensor, density in pairs]

    def trimmed(index: slice, deltas: Sequence[mx.array]) -> list[mx.array]:
        thinned = []
        for delta, (least, last) in zip(deltas, cuts, strict=True):
            size = mx.abs(delta)
            if last >= index.start + delta.size - 1:
                keep = size >= least
            elif last < index.start:
                keep = size > least
            else:
                place = mx.arange(index.start, index.start + delta.size)
                keep = (size > least) | (size == least) & (place <= last)
            thinned.append(mx.where(keep, delta, 0.0))
        return thinned

    yield from _elected(base, tensors, settings, trimmed)


def _cut_of(base: Tensor, tensor: Tensor, density: float) -> tuple[float, int]:
    """Find the `density` largest entries of a task vector; among equals, the first.

    Equal entries are common: float32 weights of similar size differ by multiples of the
    same step.

    Returns:
        The smallest absolute value to keep, and the index of the last entry to keep
        among those equal to it.
    """
    if density >= 1 or not base.size:
        return 0.0, base.size
    if density <= 0:
        return float("inf"), -1
    kept = max(1, int(density * base.size))
    sizes = np.empty(base.size, np.float32)
    flat = [base.reshape(-1), tensor.reshape(-1)]
    for index in blockwise.slices(base.size):
        sizes[index] = np.array(mx.abs(changes(index, flat)[1][0]), copy=False)
    place = sizes.size - kept
    least = np.partition(sizes, place)[place]
    equal = np.flatnonzero(sizes == least)
    over = int(np.count_nonzero(sizes > least))
    return float(least), int(equal[kept - over - 1])


def dare(base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings) -> Blocks:
    r"""DARE: drop entries at random and rescale the rest (arXiv:2311.03099).

    .. math:: W_0 + \lambda \sum_i w_i \, (b_i \circ \tau_i) / p_i, \qquad
        b_i \sim \text{Bernoulli}(p_i)

    where p are the densities. The same seed drops the same entries.
    """
    return _summed(base, tensors, settings, thin=_dropped(settings))


def dare_ties(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Blocks:
    """DARE's dropping and rescaling, then the sign election and mean of TIES."""
    return _elected(base, tensors, settings, _dropped(settings))


def _dropped(settings: TensorSettings) -> Thinning:
    """Make a thinning that keeps each entry with its input's density as probability."""
    shares, seed = settings.densities(), settings.seed

    def thin(index: slice, deltas: Sequence[mx.array]) -> list[mx.array]:
        thinned = []
        for i, (delta, share) in enumerate(zip(deltas, shares, strict=True)):
            if share >= 1:
                thinned.append(delta)
                continue
            key = mx.random.key((seed + 1_000_003 * i + 7 * index.start) % 2**64)
            kept = mx.random.bernoulli(share, delta.shape, key=key)
            larger = delta / max(share, 1e-30) if settings.rescale else delta
            thinned.append(mx.where(kept, larger, 0.0))
        return thinned

    return thin


def tsv(base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings) -> Blocks:
    r"""TSV-Merge: keep some singular vectors of each task and make them orthogonal.

    Each :math:`w_i\tau_i` keeps its min(out, in) / N largest singular triples. The
    concatenated vectors of all tasks are replaced by the nearest orthonormal vectors
    (Procrustes: :math:`U \to P Q^\top` for :math:`U = P\Sigma Q^\top`). The result is
    :math:`W_0 + \lambda \hat U \hat\Sigma \hat V^\top` (arXiv:2412.00081). Tensors that
    are not matrices get the weighted mean of the task vectors, times λ. All tensors are
    held in memory.
    """
    if base.ndim != 2:
        yield from _summed(base, tensors, settings, normalize=True)
        return
    start, *others = (
        np.array(blockwise.held(tensor).astype(mx.float32), np.float64)
        for tensor in (base, *tensors)
    )
    share = max(1, min(start.shape) // len(tensors))
    lefts, sizes, rights = [], [], []
    for other, weight in zip(others, settings.plain_weights(), strict=True):
        u, s, v = np.linalg.svd(weight * (other - start), full_matrices=False)
        kept = min(share, int((s > _TSV_NOISE * s[0]).sum()))
        lefts.append(u[:, :kept])
        sizes.append(s[:kept])
        rights.append(v[:kept].T)
    merged = start
    if any(values.size for values in sizes):
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


def _summed(
    base: Tensor,
    tensors: Sequence[Tensor],
    settings: TensorSettings,
    *,
    thin: Thinning | None = None,
    normalize: bool = False,
) -> Blocks:
    """The base plus the weighted sum of the changes, maybe thinned."""
    weights, total = settings.plain_weights(), sum(settings.plain_weights())
    normalize = (settings.normalizes(False) or normalize) and abs(total) >= 1e-8
    factor = settings.scale / (total if normalize else 1.0)

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        start, deltas = changes(index, flat)
        if thin is not None:
            deltas = thin(index, deltas)
        return start + weighted_sum(deltas, weights) * factor

    return blockwise.parts(block, [base, *tensors])


def _elected(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings, thin: Thinning
) -> Blocks:
    """The base plus the weighted mean of the changes that have the elected sign."""
    weights, normalize = settings.plain_weights(), settings.normalizes(True)

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        start, deltas = changes(index, flat)
        moved = [w * d for w, d in zip(weights, thin(index, deltas), strict=True)]
        elected = mx.where(sum_of(moved) >= 0, 1.0, -1.0)
        agrees = [mx.sign(change) == elected for change in moved]
        pairs = zip(agrees, moved, strict=True)
        total = sum_of([mx.where(agree, change, 0.0) for agree, change in pairs])
        if normalize:
            pairs = zip(agrees, weights, strict=True)
            share = sum_of([mx.where(agree, weight, 0.0) for agree, weight in pairs])
            total = total / mx.where(share == 0, 1.0, share)
        return start + settings.scale * total

    return blockwise.parts(block, [base, *tensors])


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
