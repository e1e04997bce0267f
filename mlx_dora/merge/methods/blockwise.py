"""Reads tensors, in memory or in files, block by block."""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from mlx_dora.io.gathered import GatheredTensor
from mlx_dora.io.stored import StoredTensor

Tensor = mx.array | StoredTensor | GatheredTensor
"""A tensor to merge, read in slices."""
Block = Callable[[slice, Sequence[Tensor]], mx.array]
"""(position of the block in the tensor, flat tensors) -> the merged block, float32."""

# Elements of one block: few enough for intermediate results to stay in the CPU caches.
BLOCK = 1 << 19


def slices(size: int, step: int | None = None) -> list[slice]:
    """Positions of consecutive blocks of `step` elements (or rows), by default `BLOCK`.

    There is at least one block.
    """
    step = step or BLOCK
    return [slice(first, first + step) for first in range(0, max(size, 1), step)]


def parts(
    block: Block, tensors: Sequence[Tensor], step: int | None = None
) -> Iterator[mx.array]:
    """Yield the merged tensor as consecutive flat blocks, not evaluated.

    Blocks have `step` elements, by default `BLOCK`.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    return (block(index, flat) for index in slices(flat[0].size, step))


def row_step(tensor: Tensor) -> int:
    """Elements of a block that holds whole rows (last axis) of a tensor."""
    width = max(tensor.shape[-1] if tensor.ndim else 1, 1)
    return width * max(1, BLOCK // width)


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


def values(index: slice, flat: Sequence[Tensor]) -> list[mx.array]:
    """A block of each tensor, float32."""
    return [tensor[index].astype(mx.float32) for tensor in flat]


def changes(index: slice, flat: Sequence[Tensor]) -> tuple[mx.array, list[mx.array]]:
    """A block of the base (the first tensor), and the changes of the others from it."""
    start, *others = values(index, flat)
    return start, [other - start for other in others]


def weighted_sum(
    blocks: Sequence[mx.array], weights: Sequence[float] | Sequence[mx.array]
) -> mx.array:
    """Σ w_i x_i, added in order."""
    return sum_of([w * x for w, x in zip(weights, blocks, strict=True)])


def sum_of(blocks: Sequence[mx.array]) -> mx.array:
    """Σ x_i, added in order."""
    total = blocks[0]
    for block in blocks[1:]:
        total = total + block
    return total
