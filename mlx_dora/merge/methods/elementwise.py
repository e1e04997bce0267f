r"""Element-wise merge methods on dense tensors, as pure functions.

Tensors of one name from N models, any equal shape; the result is float32 and evaluated.
Work goes through blocks, so that beside the inputs and the result little is alive. With
a base, the task vectors are :math:`\tau_i = W_i - W_0`. Where mergekit has the method
too, the definition is the same (checked against it in ``tests/merge``).
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_dora.merge.methods.blockwise import (
    Tensor,
    agreed_block,
    cut_of,
    divisor_of,
    dropped,
    linear_block,
    shares_of,
    sum_block,
    trimmed,
    weighted_sum,
    whole,
)

# Singular values below this share of the largest are rounding: making their vectors
# orthogonal to those of the other tasks would only blur these.
_TSV_NOISE = 1e-5


def linear(
    tensors: Sequence[mx.array], weights: Sequence[float], *, normalize: bool = True
) -> mx.array:
    r"""Weighted mean, :math:`\sum_i w_i W_i / \sum_i w_i` (arXiv:2203.05482).

    Args:
        tensors: N arrays of one shape.
        weights: N weights.
        normalize: Divide by the sum of the weights.

    Raises:
        DoRAError: If the weights sum to 0 and `normalize` is set.
    """
    return whole(linear_block(weights, normalize), tensors)


def task_arithmetic(
    base: mx.array,
    tensors: Sequence[mx.array],
    weights: Sequence[float],
    *,
    normalize: bool = False,
    scale: float = 1.0,
) -> mx.array:
    r"""Sum of task vectors, :math:`W_0 + \lambda\sum_i w_i\tau_i` (arXiv:2212.04089).

    Args:
        base: W0.
        tensors: N arrays of its shape.
        weights: N weights.
        normalize: Divide the sum by that of the weights.
        scale: λ.
    """
    return whole(sum_block(weights, normalize, scale), [base, *tensors])


def ties(
    base: mx.array,
    tensors: Sequence[mx.array],
    weights: Sequence[float],
    *,
    density: Sequence[float] | float,
    normalize: bool = True,
    scale: float = 1.0,
) -> mx.array:
    r"""TIES: trim, elect the sign, average those that agree (arXiv:2306.01708).

    Each task vector keeps its `density` largest entries (of equal ones those that come
    first); the sign of
    :math:`\sum_i w_i\tau_i` is elected element by element, and the weighted mean of the
    entries that have it is added to W0, times λ.

    Args:
        base: W0.
        tensors: N arrays of its shape.
        weights: N weights.
        density: Share of the entries to keep, of each or of all.
        normalize: Divide by the weights of those that agree, not by 1.
        scale: λ.
    """
    shares = shares_of(density, len(tensors))
    cuts = [cut_of(base, *one) for one in zip(tensors, shares, strict=True)]
    block = agreed_block(weights, normalize, scale, trimmed(cuts))
    return whole(block, [base, *tensors])


def dare(
    base: mx.array,
    tensors: Sequence[mx.array],
    weights: Sequence[float],
    *,
    density: Sequence[float] | float,
    seed: int = 0,
    normalize: bool = False,
    scale: float = 1.0,
) -> mx.array:
    r"""DARE: drop entries at random and rescale the rest (arXiv:2311.03099).

    .. math:: W_0 + \lambda \sum_i w_i \, (b_i \circ \tau_i) / p_i, \qquad
        b_i \sim \text{Bernoulli}(p_i)

    Args:
        base: W0.
        tensors: N arrays of its shape.
        weights: N weights.
        density: p, the share of the entries to keep, of each or of all.
        seed: Of the random numbers; the same seed drops the same entries.
        normalize: Divide the sum by that of the weights.
        scale: λ.
    """
    thin = dropped(shares_of(density, len(tensors)), seed)
    return whole(sum_block(weights, normalize, scale, thin), [base, *tensors])


def dare_ties(
    base: mx.array,
    tensors: Sequence[mx.array],
    weights: Sequence[float],
    *,
    density: Sequence[float] | float,
    seed: int = 0,
    normalize: bool = True,
    scale: float = 1.0,
) -> mx.array:
    """DARE's dropping and rescaling, then the sign election and mean of TIES.

    Arguments as those of `dare` and `ties`.
    """
    thin = dropped(shares_of(density, len(tensors)), seed)
    block = agreed_block(weights, normalize, scale, thin)
    return whole(block, [base, *tensors])


def tsv(
    base: mx.array, tensors: Sequence[mx.array], weights: Sequence[float], *,
    scale: float = 1.0,
) -> mx.array:  # fmt: skip
    r"""TSV-Merge: a share of each task's singular vectors, made orthogonal.

    Each :math:`w_i\tau_i` keeps its min(out, in) / N largest singular triples; the
    vectors of all tasks side by side are replaced by the nearest orthonormal ones
    (Procrustes: :math:`U \to P Q^\top` for :math:`U = P\Sigma Q^\top`), and
    :math:`W_0 + \lambda \hat U \hat\Sigma \hat V^\top` is returned (arXiv:2412.00081).
    A tensor that is no matrix gets the weighted mean of the task vectors, times λ.

    Args:
        base: W0. Shape ``(out, in)``.
        tensors: N arrays of its shape.
        weights: N weights.
        scale: λ.
    """
    count = len(tensors)
    if base.ndim != 2:
        return task_arithmetic(base, tensors, weights, normalize=True, scale=scale)
    start = np.array(base.astype(mx.float32), np.float64)
    share = max(1, min(start.shape) // count)
    lefts, sizes, rights = [], [], []
    for one, weight in zip(tensors, weights, strict=True):
        tau = weight * (np.array(one.astype(mx.float32), np.float64) - start)
        u, s, v = np.linalg.svd(tau, full_matrices=False)
        kept = min(share, int((s > _TSV_NOISE * s[0]).sum()))
        lefts.append(u[:, :kept])
        sizes.append(s[:kept])
        rights.append(v[:kept].T)
    if not any(one.size for one in sizes):
        return mx.array(start.astype(np.float32))
    u, v = (_orthonormal(np.concatenate(part, axis=1)) for part in (lefts, rights))
    merged = start + scale * (u * np.concatenate(sizes)) @ v.T
    return mx.array(merged.astype(np.float32))


def fisher(
    tensors: Sequence[mx.array],
    fishers: Sequence[mx.array],
    weights: Sequence[float],
) -> mx.array:
    r"""Fisher-weighted mean, element by element (arXiv:2111.09832).

    .. math:: \frac{\sum_i w_i F_i \circ W_i}{\sum_i w_i F_i}

    with F the diagonal Fisher information. Where every F is 0 nothing is known, and the
    weighted mean is taken.

    Args:
        tensors: N arrays of one shape.
        fishers: As many of the same shape, at least 0.
        weights: N weights.
    """
    count, total = len(tensors), divisor_of(weights)

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        values = [one[index].astype(mx.float32) for one in flat]
        known = weighted_sum(values[count:], weights)
        products = [a * b for a, b in zip(values[:count], values[count:], strict=True)]
        mean = weighted_sum(values[:count], weights) / total
        safe = mx.where(known > 0, known, 1.0)
        return mx.where(known > 0, weighted_sum(products, weights) / safe, mean)

    return whole(block, [*tensors, *fishers])


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(columns, full_matrices=False)
    return left @ right
