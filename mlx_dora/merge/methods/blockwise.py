"""Merges tensors element by element, in blocks, from memory or from files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.stored import StoredTensor

Tensor = mx.array | StoredTensor
"""A tensor to merge, read in slices."""
Block = Callable[[slice, Sequence[Tensor]], mx.array]
"""(position of the block in the tensor, flat tensors) -> the merged block, float32."""

# Elements of one block: few enough for intermediate results to stay in the CPU caches.
BLOCK = 1 << 19


def parts(block: Block, tensors: Sequence[Tensor]) -> Iterator[mx.array]:
    """Yield the merged tensor as consecutive flat blocks, not evaluated."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for first in range(0, max(flat[0].size, 1), BLOCK):
        yield block(slice(first, first + BLOCK), flat)


def whole(block: Block, tensors: Sequence[Tensor]) -> mx.array:
    """The merged tensor, evaluated."""
    return joined(parts(block, tensors), tensors[0].shape)


def joined(blocks: Iterator[mx.array], shape: tuple[int, ...]) -> mx.array:
    """Join consecutive blocks into one tensor, evaluating one block at a time."""
    pieces = []
    for block in blocks:
        mx.eval(block)
        pieces.append(block.reshape(-1))
    tensor = (pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)).reshape(shape)
    mx.eval(tensor)
    return tensor


def held(tensor: Tensor) -> mx.array:
    """Load a whole tensor into memory."""
    return tensor.reshape(-1)[:].reshape(tensor.shape)


def linear_block(weights: Sequence[float], normalize: bool) -> Block:
    """Block function of `mlx_dora.merge.methods.elementwise.linear`."""
    total = divisor_of(weights) if normalize else 1.0

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        # Sum first, then divide once: rounds as mergekit does.
        values = [tensor[index].astype(mx.float32) for tensor in flat]
        return weighted_sum(values, weights) / total

    return block


def changes(index: slice, flat: Sequence[Tensor]) -> tuple[mx.array, list[mx.array]]:
    """A block of the base (the first tensor), and the changes of the others from it."""
    start, *others = (tensor[index].astype(mx.float32) for tensor in flat)
    return start, [other - start for other in others]


def sum_block(
    weights: Sequence[float],
    normalize: bool,
    scale: float,
    thinned: "Thinning | None" = None,
) -> Block:
    """Block function: the base plus the weighted sum of the changes, maybe thinned."""
    total = sum(weights)
    divisor = total if normalize and abs(total) >= 1e-8 else 1.0

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        start, deltas = changes(index, flat)
        if thinned is not None:
            deltas = thinned(index, deltas)
        return start + weighted_sum(deltas, weights) * (scale / divisor)

    return block


Thinning = Callable[[slice, Sequence[mx.array]], list[mx.array]]
"""(position, blocks of the changes) -> the blocks with some entries set to 0."""


def agreed_block(
    weights: Sequence[float], normalize: bool, scale: float, thinned: Thinning
) -> Block:
    """Block function: the base plus the mean of the changes with the elected sign."""

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        start, deltas = changes(index, flat)
        moved = [w * d for w, d in zip(weights, thinned(index, deltas), strict=True)]
        elected = mx.where(sum_of(moved) >= 0, 1.0, -1.0)
        agrees = [mx.sign(change) == elected for change in moved]
        total = sum_of(
            [mx.where(a, d, 0.0) for a, d in zip(agrees, moved, strict=True)]
        )
        if normalize:
            share = sum_of(
                [mx.where(a, w, 0.0) for a, w in zip(agrees, weights, strict=True)]
            )
            total = total / mx.where(share == 0, 1.0, share)
        return start + scale * total

    return block


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The entries to keep: all larger than `least`, and those equal to it up to `last`.

    Attributes:
        least: Smallest absolute value to keep.
        last: Index of the last entry to keep among those equal to `least`.
    """

    least: float
    last: int


def cut_of(base: Tensor, tensor: Tensor, density: float) -> Cut:
    """Find the `density` largest entries of a task vector; among equals, the first.

    Equal entries are common: float32 weights of similar size differ by multiples of the
    same step.
    """
    if density >= 1 or not base.size:
        return Cut(least=0.0, last=base.size)
    if density <= 0:
        return Cut(least=float("inf"), last=-1)
    kept = max(1, int(density * base.size))
    sizes = np.empty(base.size, np.float32)
    flat = [base.reshape(-1), tensor.reshape(-1)]
    for first in range(0, base.size, BLOCK):
        index = slice(first, first + BLOCK)
        sizes[index] = np.array(mx.abs(changes(index, flat)[1][0]), copy=False)
    place = sizes.size - kept
    least = np.partition(sizes, place)[place]
    equal = np.flatnonzero(sizes == least)
    over = int(np.count_nonzero(sizes > least))
    return Cut(least=float(least), last=int(equal[kept - over - 1]))


def trimmed(cuts: Sequence[Cut]) -> Thinning:
    """Make a thinning that keeps the largest entries."""

    def thin(index: slice, deltas: Sequence[mx.array]) -> list[mx.array]:
        thinned = []
        for delta, cut in zip(deltas, cuts, strict=True):
            size = mx.abs(delta)
            if cut.last >= index.start + delta.size - 1:
                keep = size >= cut.least
            elif cut.last < index.start:
                keep = size > cut.least
            else:
                place = mx.arange(index.start, index.start + delta.size)
                keep = (size > cut.least) | (size == cut.least) & (place <= cut.last)
            thinned.append(mx.where(keep, delta, 0.0))
        return thinned

    return thin


def dropped(shares: Sequence[float], seed: int, rescale: bool = True) -> Thinning:
    """Make a thinning that keeps each entry with its input's probability in `shares`.

    With `rescale`, kept entries are divided by that probability.
    """

    def thin(index: slice, deltas: Sequence[mx.array]) -> list[mx.array]:
        thinned = []
        for i, (delta, share) in enumerate(zip(deltas, shares, strict=True)):
            if share >= 1:
                thinned.append(delta)
                continue
            key = mx.random.key((seed + 1_000_003 * i + 7 * index.start) % 2**64)
            kept = mx.random.bernoulli(share, delta.shape, key=key)
            larger = delta / max(share, 1e-30) if rescale else delta
            thinned.append(mx.where(kept, larger, 0.0))
        return thinned

    return thin


def weighted_sum(values: Sequence[mx.array], weights: Sequence[float]) -> mx.array:
    """Σ w_i x_i."""
    return sum_of([w * v for w, v in zip(weights, values, strict=True)])


def sum_of(values: Sequence[mx.array]) -> mx.array:
    """Σ x_i, added in order."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def shares_of(density: Sequence[float] | float, count: int) -> list[float]:
    """One density per input.

    Raises:
        DoRAError: If a density is not between 0 and 1, or their number is wrong.
    """
    is_single = isinstance(density, int | float)
    shares = (
        [float(density)] * count if is_single else [float(share) for share in density]
    )
    if len(shares) != count or not all(0 <= share <= 1 for share in shares):
        raise DoRAError(
            f"density must be a share from 0 to 1 for each of {count} inputs, got "
            f"{density}."
        )
    return shares


def divisor_of(weights: Sequence[float]) -> float:
    """The sum of the weights.

    Raises:
        DoRAError: If it is 0.
    """
    total = sum(weights)
    if abs(total) < 1e-8:
        raise DoRAError(
            f"the weights {list(weights)} sum to 0 and cannot be normalized."
        )
    return total
