"""Walking over the output rows of a weight, dense or packed, in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_dora.kernels.quantized import QuantizedWeight

Weight = mx.array | QuantizedWeight

# Elements of one block: its float32 copy takes 4 MB.
_BLOCK = 1 << 20
# Between these a sum of squares has lost nothing to under- or overflow.
_LEAST_SQUARE = 2.0**-60
_LARGEST_SQUARE = 2.0**120


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


def are_ordinary(squares: mx.array) -> bool:
    """Whether sums of squares are far from where float32 ends; False while traced.

    Evaluates them. Rows of norm 1e-9 to 1e18 are ordinary; a zero row is not.
    """
    try:
        return not beyond_squares(squares).any()
    except ValueError:  # a placeholder of `mx.compile` or `mx.vmap`, without a value
        return False


def beyond_squares(squares: mx.array) -> mx.array:
    """Which sums of squares may have over- or underflowed, zeros and NaN among them."""
    return ~((squares >= _LEAST_SQUARE) & (squares <= _LARGEST_SQUARE))


def near_one(values: mx.array, axis: int) -> tuple[mx.array, mx.array]:
    """Bring rows (or columns) near 1 by powers of two, which rounds nothing.

    Squares of what is beyond about 1e18 overflow float32, and those of what is below
    1e-20 vanish; squares of the scaled values do neither.

    Args:
        values: Shape ``(out, in)``, float32.
        axis: The axis along which all share a factor: 1 for rows, 0 for columns.

    Returns:
        The scaled values, whose largest is in 1 to 4 (below 1 where all of them are
        subnormal), and the powers of two that give `values` back, with `axis` kept.
    """
    fixed = mx.stop_gradient(values)
    largest = mx.maximum(
        mx.max(fixed, axis=axis, keepdims=True),
        -mx.min(fixed, axis=axis, keepdims=True),
    )
    # The exponent's bits alone are the power of two below a number. Both ends are cut
    # to where the inverse is a normal number too.
    power = (largest.view(mx.uint32) & 0x7F800000).view(mx.float32)
    power = mx.clip(power, 2.0**-126, 2.0**126)
    return values * (1 / power), power


def row_norms(values: mx.array) -> mx.array:
    """Length of each row, right for every finite row. Shape ``(out,)``, float32."""
    full = values.astype(mx.float32)
    squares = mx.square(full).sum(axis=1)
    if not full.size or are_ordinary(squares):
        return mx.sqrt(squares)
    scaled, power = near_one(full, axis=1)
    return mx.sqrt(mx.square(scaled).sum(axis=1)) * power[:, 0]


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
