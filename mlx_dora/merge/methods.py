r"""Element-wise merge methods on dense tensors, as pure functions.

Tensors of one name from N models, any equal shape; the result is float32 and evaluated.
Work goes through blocks, so that beside the inputs and the result little is alive. With
a base, the task vectors are :math:`\tau_i = W_i - W_0`. Where mergekit has the method
too, the definition is the same (checked against it in ``tests/merge``).
"""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError

# Elements worked on at once.
_BLOCK = 1 << 21
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
    total = _divisor(weights) if normalize else 1.0

    def block(index: slice, flat: Sequence[mx.array]) -> mx.array:
        # The sum first and one division after it, as mergekit rounds.
        return _weighted_sum([one[index] for one in flat], weights) / total

    return _by_blocks(block, tensors)


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
    total = sum(weights)
    divisor = total if normalize and abs(total) >= 1e-8 else 1.0

    def block(index: slice, flat: Sequence[mx.array]) -> mx.array:
        start, *others = (one[index].astype(mx.float32) for one in flat)
        moved = _weighted_sum([one - start for one in others], weights)
        return start + moved * (scale / divisor)

    return _by_blocks(block, [base, *tensors])


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

    Each task vector keeps its `density` largest entries; the sign of
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
    keeps = [
        _threshold(base, one, share)
        for one, share in zip(tensors, _each(density, len(tensors)), strict=True)
    ]

    def trimmed(index: slice, flat: Sequence[mx.array]) -> list[mx.array]:
        start, *others = (one[index].astype(mx.float32) for one in flat)
        deltas = [one - start for one in others]
        return [
            mx.where(mx.abs(delta) >= least, delta, 0.0)
            for delta, least in zip(deltas, keeps, strict=True)
        ]

    return _agreed(base, tensors, weights, trimmed, normalize, scale)


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
    total = sum(weights)
    divisor = total if normalize and abs(total) >= 1e-8 else 1.0
    dropped = _dropped(_each(density, len(tensors)), seed)

    def block(index: slice, flat: Sequence[mx.array]) -> mx.array:
        start = flat[0][index].astype(mx.float32)
        moved = _weighted_sum(dropped(index, flat), weights)
        return start + moved * (scale / divisor)

    return _by_blocks(block, [base, *tensors])


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
    dropped = _dropped(_each(density, len(tensors)), seed)
    return _agreed(base, tensors, weights, dropped, normalize, scale)


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
    count, total = len(tensors), _divisor(weights)

    def block(index: slice, flat: Sequence[mx.array]) -> mx.array:
        values = [one[index].astype(mx.float32) for one in flat]
        known = _weighted_sum(values[count:], weights)
        products = [a * b for a, b in zip(values[:count], values[count:], strict=True)]
        mean = _weighted_sum(values[:count], weights) / total
        safe = mx.where(known > 0, known, 1.0)
        return mx.where(known > 0, _weighted_sum(products, weights) / safe, mean)

    return _by_blocks(block, [*tensors, *fishers])


Deltas = Callable[[slice, Sequence[mx.array]], list[mx.array]]


def _agreed(
    base: mx.array,
    tensors: Sequence[mx.array],
    weights: Sequence[float],
    deltas: Deltas,
    normalize: bool,
    scale: float,
) -> mx.array:
    """W0 plus the mean of those weighted deltas that have the elected sign."""

    def block(index: slice, flat: Sequence[mx.array]) -> mx.array:
        moved = [w * d for w, d in zip(weights, deltas(index, flat), strict=True)]
        elected = mx.where(_sum(moved) >= 0, 1.0, -1.0)
        agrees = [mx.sign(one) == elected for one in moved]
        total = _sum([mx.where(a, d, 0.0) for a, d in zip(agrees, moved, strict=True)])
        if normalize:
            share = _sum(
                [mx.where(a, w, 0.0) for a, w in zip(agrees, weights, strict=True)]
            )
            total = total / mx.where(share == 0, 1.0, share)
        return flat[0][index].astype(mx.float32) + scale * total

    return _by_blocks(block, [base, *tensors])


def _dropped(shares: Sequence[float], seed: int) -> Deltas:
    def deltas(index: slice, flat: Sequence[mx.array]) -> list[mx.array]:
        start, *others = (one[index].astype(mx.float32) for one in flat)
        found = []
        for i, (one, share) in enumerate(zip(others, shares, strict=True)):
            if share >= 1:
                found.append(one - start)
                continue
            key = mx.random.key(seed + 1_000_003 * i + 7 * index.start)
            kept = mx.random.bernoulli(share, start.shape, key=key)
            found.append(mx.where(kept, (one - start) / max(share, 1e-30), 0.0))
        return found

    return deltas


def _threshold(base: mx.array, tensor: mx.array, density: float) -> float:
    """The smallest size that belongs to the `density` largest entries of τ."""
    if density >= 1 or not base.size:
        return 0.0
    if density <= 0:
        return float("inf")
    kept = max(1, int(density * base.size))
    sizes = np.concatenate(
        [
            np.array(mx.abs(b.astype(mx.float32) - a.astype(mx.float32)))
            for a, b in _blocks_of(base, tensor)
        ]
    )
    place = sizes.size - kept
    sizes.partition(place)
    return float(sizes[place])


def _blocks_of(*tensors: mx.array) -> Iterator[tuple[mx.array, ...]]:
    flat = [one.reshape(-1) for one in tensors]
    for start in range(0, flat[0].size, _BLOCK):
        yield tuple(one[start : start + _BLOCK] for one in flat)


def _by_blocks(
    block: Callable[[slice, Sequence[mx.array]], mx.array], tensors: Sequence[mx.array]
) -> mx.array:
    flat = [one.reshape(-1) for one in tensors]
    mx.eval(flat)
    parts = []
    for start in range(0, max(flat[0].size, 1), _BLOCK):
        parts.append(block(slice(start, start + _BLOCK), flat))
        mx.eval(parts[-1])
    merged = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    merged = merged.reshape(tensors[0].shape)
    mx.eval(merged)
    return merged


def _weighted_sum(values: Sequence[mx.array], weights: Sequence[float]) -> mx.array:
    return _sum([w * v for w, v in zip(weights, values, strict=True)])


def _sum(values: Sequence[mx.array]) -> mx.array:
    total = values[0]
    for one in values[1:]:
        total = total + one
    return total


def _each(share: Sequence[float] | float, count: int) -> list[float]:
    one_for_all = isinstance(share, int | float)
    shares = [float(share)] * count if one_for_all else [float(one) for one in share]
    if len(shares) != count or not all(0 <= one <= 1 for one in shares):
        raise DoRAError(
            f"density must be a share from 0 to 1 for each of {count} inputs, got "
            f"{share}."
        )
    return shares


def _divisor(weights: Sequence[float]) -> float:
    total = sum(weights)
    if abs(total) < 1e-8:
        raise DoRAError(
            f"the weights {list(weights)} sum to 0 and cannot be normalised."
        )
    return total


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(columns, full_matrices=False)
    return left @ right
