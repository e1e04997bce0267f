"""Walking over the output rows of a weight, dense or packed, in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_dora.kernels.quantized import QuantizedWeight

Weight = mx.array | QuantizedWeight

# Elements of one block: its float32 copy takes 4 MB.
_BLOCK = 1 << 20


def row_blocks(
    weight: Weight, elements: int | None = None
) -> Iterator[tuple[slice, mx.array]]:
    """Consecutive row blocks in the (unpacked) dtype of the weight, with slices.

    Args:
        weight: Dense or packed.
        elements: Of one block; None for about one million.
    """
    out, width = weight.shape
    step = max(1, (elements or _BLOCK) // max(width, 1))
    for start in range(0, out, step):
        index = slice(start, min(start + step, out))
        if isinstance(weight, QuantizedWeight):
            yield index, weight.rows(index).dequantize()
        else:
            yield index, weight[index]


def row_squares(weight: Weight) -> mx.array:
    """Sum of squares of each output row, accumulated in float32. Shape ``(out,)``."""
    parts = [
        mx.square(block.astype(mx.float32)).sum(axis=1)
        for _, block in row_blocks(weight)
    ]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def matrices(weight: Weight) -> list[Weight]:
    """The matrices of a stack ``(n, out, in)``, sharing its memory; or the one."""
    if len(weight.shape) == 2:
        return [weight]
    if not isinstance(weight, QuantizedWeight):
        return list(_slices(weight))
    none = [None] * weight.shape[0]
    biases = none if weight.biases is None else _slices(weight.biases)
    parts = zip(_slices(weight.weight), _slices(weight.scales), biases, strict=True)
    return [replace(weight, weight=w, scales=s, biases=b) for w, s, b in parts]


def _slices(stack: mx.array) -> list[mx.array]:
    # Not stack[i], which copies: a list of those would be the stack once more.
    return [stack[i : i + 1].squeeze(0) for i in range(stack.shape[0])]


def stacked(weights: Sequence[Weight]) -> Weight:
    """The opposite of `matrices`: one stack of matrices of one form."""
    first = weights[0]
    if not isinstance(first, QuantizedWeight):
        return mx.stack([one for one in weights if isinstance(one, mx.array)])
    packed = [one for one in weights if isinstance(one, QuantizedWeight)]
    biases = [one.biases for one in packed if one.biases is not None]
    return replace(
        first,
        weight=mx.stack([one.weight for one in packed]),
        scales=mx.stack([one.scales for one in packed]),
        biases=mx.stack(biases) if biases else None,
    )
