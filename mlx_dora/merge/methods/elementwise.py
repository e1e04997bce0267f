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

from mlx_dora.merge.methods import blockwise
from mlx_dora.merge.methods.blockwise import Tensor
from mlx_dora.merge.methods.settings import TensorSettings

# Singular values below this share of the largest are rounding errors. Including their
# vectors in the orthogonalization would only blur those of the other tasks.
_TSV_NOISE = 1e-5

Blocks = Iterator[mx.array]


def linear(
    base: Tensor | None, tensors: Sequence[Tensor], settings: TensorSettings
) -> Blocks:
    r"""Weighted mean, :math:`\sum_i w_i W_i / \sum_i w_i` (arXiv:2203.05482).

    Raises:
        DoRAError: If the weights sum to 0 but must be normalized.
    """
    weights = settings.plain_weights()
    block = blockwise.linear_block(weights, settings.normalizes(True))
    return blockwise.parts(block, tensors)


def task_arithmetic(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Blocks:
    r"""Task arithmetic, :math:`W_0 + \lambda\sum_i w_i\tau_i` (arXiv:2212.04089)."""
    return _merge(blockwise.sum_block, base, tensors, settings, None, False)


def ties(base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings) -> Blocks:
    r"""TIES: trim, elect the sign, average those that agree (arXiv:2306.01708).

    Each task vector keeps its `density` largest entries (the first, among equals). The
    sign of :math:`\sum_i w_i\tau_i` is elected for each element. The weighted mean of
    the entries with that sign, times λ, is added to W0.
    """
    pairs = zip(tensors, _densities(tensors, settings), strict=True)
    thin = blockwise.trimmed([blockwise.cut_of(base, *pair) for pair in pairs])
    return _merge(blockwise.agreed_block, base, tensors, settings, thin, True)


def dare(base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings) -> Blocks:
    r"""DARE: drop entries at random and rescale the rest (arXiv:2311.03099).

    .. math:: W_0 + \lambda \sum_i w_i \, (b_i \circ \tau_i) / p_i, \qquad
        b_i \sim \text{Bernoulli}(p_i)

    where p are the densities. The same seed drops the same entries.
    """
    thin = _dropped(tensors, settings)
    return _merge(blockwise.sum_block, base, tensors, settings, thin, False)


def dare_ties(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Blocks:
    """DARE's dropping and rescaling, then the sign election and mean of TIES."""
    thin = _dropped(tensors, settings)
    return _merge(blockwise.agreed_block, base, tensors, settings, thin, True)


def tsv(base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings) -> Blocks:
    r"""TSV-Merge: keep some singular vectors of each task and make them orthogonal.

    Each :math:`w_i\tau_i` keeps its min(out, in) / N largest singular triples. The
    concatenated vectors of all tasks are replaced by the nearest orthonormal vectors
    (Procrustes: :math:`U \to P Q^\top` for :math:`U = P\Sigma Q^\top`). The result is
    :math:`W_0 + \lambda \hat U \hat\Sigma \hat V^\top` (arXiv:2412.00081). Tensors that
    are not matrices get the weighted mean of the task vectors, times λ. All tensors are
    held in memory.
    """
    weights = settings.plain_weights()
    if base.ndim != 2:
        block = blockwise.sum_block(weights, True, settings.scale)
        yield from blockwise.parts(block, [base, *tensors])
        return
    start, *others = (
        np.array(blockwise.held(tensor).astype(mx.float32), np.float64)
        for tensor in (base, *tensors)
    )
    share = max(1, min(start.shape) // len(tensors))
    lefts, sizes, rights = [], [], []
    for other, weight in zip(others, weights, strict=True):
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

    Args:
        tensors: N arrays of the same shape.
        fishers: N nonnegative arrays of that shape.
        weights: N weights.

    Returns:
        The merged tensor, evaluated, and the number of elements without information.
    """
    count, total = len(tensors), blockwise.divisor_of(weights)

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        values = [tensor[index].astype(mx.float32) for tensor in flat]
        known = blockwise.weighted_sum(values[count:], weights)
        products = [a * b for a, b in zip(values[:count], values[count:], strict=True)]
        mean = blockwise.weighted_sum(values[:count], weights) / total
        safe = mx.where(known > 0, known, 1.0)
        merged = blockwise.weighted_sum(products, weights) / safe
        return mx.where(known > 0, merged, mean)

    every = [*tensors, *fishers]
    merged = blockwise.joined(blockwise.parts(block, every), tensors[0].shape)
    return merged, int((sum(fishers[1:], start=fishers[0]) == 0).sum())


def _merge(
    make: Callable[..., blockwise.Block],
    base: Tensor,
    tensors: Sequence[Tensor],
    settings: TensorSettings,
    thin: blockwise.Thinning | None,
    normalize: bool,
) -> Blocks:
    weights = settings.plain_weights()
    normalize = settings.normalizes(normalize)
    block = make(weights, normalize, settings.scale, thin)
    return blockwise.parts(block, [base, *tensors])


def _densities(tensors: Sequence[Tensor], settings: TensorSettings) -> list[float]:
    density = settings.density or (1.0,) * len(tensors)
    return blockwise.shares_of(density, len(tensors))


def _dropped(tensors: Sequence[Tensor], settings: TensorSettings) -> blockwise.Thinning:
    shares = _densities(tensors, settings)
    return blockwise.dropped(shares, settings.seed, settings.rescale)


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(columns, full_matrices=False)
    return left @ right
