"""A frozen weight W0, dense or packed: its rows, blocks and products.

Through these functions, the rest of the package treats a dense array, a
`QuantizedWeight` and a `ShardedWeight` alike. Only this module reads W0 in blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.sharded import ShardedWeight

Weight = mx.array | QuantizedWeight | ShardedWeight
"""A matrix ``(out, in)``, or a stack of them ``(n, out, in)``.

A `ShardedWeight` is a matrix. All processes of its group must make the same calls.
"""

TENSOR_ROWS = (nn.AllToShardedLinear, nn.QuantizedAllToShardedLinear)
"""MLX's linear layers of which a process holds rows, with the whole input."""
TENSOR_COLUMNS = (nn.ShardedToAllLinear, nn.QuantizedShardedToAllLinear)
"""MLX's linear layers of which a process holds columns, with its part of the input."""

# Elements of a block, whose float32 copy takes 4 MB.
_BLOCK = 1 << 20
# Between these bounds, a sum of squares is not affected by underflow or overflow.
_LEAST_SQUARE = 2.0**-60
_LARGEST_SQUARE = 2.0**120


def weight_from(parts: Mapping[str, Any], packing: Any) -> Weight:
    """Return the weight of a module from its arrays.

    Args:
        parts: ``weight`` and, if packed, ``scales`` and ``biases``; ``_row_squares``
            if they are a process's share of the rows.
        packing: The module, with ``group_size``, ``bits`` and ``mode``; with ``group``
            if processes divide its weight.

    Raises:
        DoRAError: If the weight is packed with a global scale.
    """
    part: mx.array | QuantizedWeight
    if "scales" not in parts:
        part = parts["weight"]
    elif parts.get("global_scale") is not None:
        raise DoRAError(
            f"{type(packing).__name__} has weights with a global scale, to which DoRA "
            "cannot be applied."
        )
    else:
        part = QuantizedWeight(
            weight=parts["weight"],
            scales=parts["scales"],
            biases=parts.get("biases"),
            group_size=cast(int, packing.group_size),
            bits=cast(int, packing.bits),
            mode=cast(str, packing.mode),
        )
    squares = parts.get("_row_squares")
    has_columns = isinstance(packing, TENSOR_COLUMNS)
    if squares is None and not (has_columns or isinstance(packing, TENSOR_ROWS)):
        return part
    return ShardedWeight(
        part=part, group=packing.group, squares=squares, axis=int(has_columns)
    )


def weight_of(module: Any) -> Weight:
    """Return a module's weight, dense or packed; a stack for experts or heads.

    Raises:
        DoRAError: If the weight is packed with a global scale.
    """
    return weight_from(module, module)


def as_packed(weight: Weight) -> QuantizedWeight | None:
    """Return the weight if it is packed, None if it is dense."""
    return weight if isinstance(weight, QuantizedWeight) else None


def take_rows(weight: Weight, index: slice | mx.array) -> Weight:
    """Return some output rows, packed if the weight is packed."""
    if isinstance(weight, ShardedWeight) and weight.axis:
        return replace(weight, part=take_rows(weight.part, index)).whole()
    if isinstance(weight, ShardedWeight):
        weight = weight.whole()
    if isinstance(weight, QuantizedWeight):
        return weight.rows(index)
    return weight[index]


def dense(weight: Weight) -> mx.array:
    """Return the whole weight, unpacked in its own dtype."""
    if isinstance(weight, ShardedWeight):
        weight = weight.whole()
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def dense_dtype(weight: Weight) -> mx.Dtype:
    """Return the dtype of the unpacked weight."""
    if isinstance(weight, ShardedWeight):
        weight = weight.part
    return dense(take_rows(weight, slice(0, 1))).dtype


def unpacked_dtype(weight: Weight, own: mx.Dtype) -> mx.Dtype:
    """Return the dtype of a weight made dense, in a model of dtype `own`.

    Scales in mode ``affine`` have the model's dtype. In other modes they are bytes,
    which MLX always unpacks to bfloat16; the result is then `own`.
    """
    if isinstance(weight, ShardedWeight):
        weight = weight.part
    if isinstance(weight, QuantizedWeight) and weight.biases is None:
        return own
    return dense_dtype(weight)


def float32_rows(weight: Weight, index: slice | mx.array) -> mx.array:
    """Return some output rows in float32. Shape ``(len(index), in)``."""
    return dense(take_rows(weight, index)).astype(mx.float32)


def exact_float32_rows(weight: Weight, index: slice) -> mx.array:
    """Return output rows in float32, without rounding to the dtype of the scales."""
    rows = take_rows(weight, index)
    if isinstance(rows, QuantizedWeight) and rows.biases is not None:
        rows = replace(
            rows,
            scales=rows.scales.astype(mx.float32),
            biases=rows.biases.astype(mx.float32),
        )
    return dense(rows).astype(mx.float32)


def row_blocks(
    weight: Weight, elements: int | None = None
) -> Iterator[tuple[slice, mx.array]]:
    """Yield slices and blocks of consecutive rows, unpacked in the weight's dtype.

    Args:
        weight: Dense or packed. Shape ``(out, in)``.
        elements: Greatest number of elements per block; None for about one million.
    """
    if isinstance(weight, ShardedWeight):
        weight = weight.whole()
    out, width = weight.shape
    step = max(1, (elements or _BLOCK) // max(width, 1))
    for start in range(0, out, step):
        index = slice(start, min(start + step, out))
        yield index, dense(take_rows(weight, index))


def row_squares(weight: Weight) -> mx.array:
    """Return ‖W0‖² of each output row, summed in float32. Shape ``(..., out)``."""
    if isinstance(weight, ShardedWeight):
        if weight.squares is not None:
            return weight.squares
        own = row_squares(weight.part)
        return weight.summed(own) if weight.axis else weight.gathered(own)
    if len(weight.shape) > 2:
        squares = [row_squares(matrix) for matrix in matrices(weight)]
        mx.eval(squares)
        return mx.stack(squares)
    parts = [squared_rows(block) for _, block in row_blocks(weight)]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def squared_rows(block: mx.array) -> mx.array:
    """Return the sum of squares of each row in float32, one number per output."""
    return mx.square(block.astype(mx.float32)).sum(axis=-1)


def row_norms(block: mx.array) -> mx.array:
    """Return the length of each row of a dense weight: the norm of Eq. 2 and Eq. 5.

    It is accurate for every finite row, and inf only where the norm exceeds the range
    of float32. Shape ``(..., out)``, float32.
    """
    _, norm, power = measured_rows(block)
    return norm if power is None else norm * power


def measured_rows(block: mx.array) -> tuple[mx.array, mx.array, mx.array | None]:
    """Return rows in float32 and their lengths, scaled if squares might overflow.

    Args:
        block: Rows, shape ``(..., out, in)``, any float dtype.

    Returns:
        The rows, their lengths ``(..., out)``, and the powers of two ``(..., out)``
        by which both must be multiplied; None if nothing was scaled.
    """
    full = block.astype(mx.float32)
    squares = squared_rows(full)
    if not full.size or are_ordinary(squares):
        return full, mx.sqrt(squares), None
    full, power = scaled_to_unit(full, axis=-1)
    return full, mx.sqrt(squared_rows(full)), power[..., 0]


def are_ordinary(squares: mx.array) -> bool:
    """Return whether all sums of squares are well inside float32; False while traced.

    This evaluates them. Rows of norm 1e-9 to 1e18 are ordinary; a zero row is not.
    """
    try:
        return not beyond_squares(squares).any()
    except ValueError:  # a placeholder of `mx.compile` or `mx.vmap`, without a value
        return False


def beyond_squares(squares: mx.array) -> mx.array:
    """Return which sums of squares may have overflowed or underflowed, or are NaN."""
    return ~((squares >= _LEAST_SQUARE) & (squares <= _LARGEST_SQUARE))


def scaled_to_unit(values: mx.array, axis: int) -> tuple[mx.array, mx.array]:
    """Scale rows (or columns) near 1 by powers of two, which is exact.

    Squares of values above about 1e18 overflow float32, and squares of values below
    1e-20 vanish. Squares of the scaled values do neither.

    Args:
        values: Values to scale, shape ``(..., out, in)``, float32.
        axis: Axis whose elements share a factor: -1 for rows, -2 for columns.

    Returns:
        The scaled values, and the powers of two that restore `values`, with `axis`
        kept. The largest scaled value is between 1 and 4 (below 1 where all values
        are subnormal).
    """
    fixed = mx.stop_gradient(values)
    largest = mx.maximum(
        mx.max(fixed, axis=axis, keepdims=True),
        -mx.min(fixed, axis=axis, keepdims=True),
    )
    # The exponent bits give the largest power of two not above a number. Clip it to
    # the range where its inverse is a normal number too.
    power = (largest.view(mx.uint32) & 0x7F800000).view(mx.float32)
    power = mx.clip(power, 2.0**-126, 2.0**126)
    return values * (1 / power), power


def product(weight: Weight, lora_a: mx.array) -> mx.array:
    """Return U = W0·A for training, without evaluating it.

    A dense weight is multiplied in its own dtype, because a float32 A would make a
    float32 copy of W0. A packed weight is not unpacked as a whole on a GPU.

    Args:
        weight: Base weight W0, shape ``(..., out, in)``.
        lora_a: Down projection A, shape ``(..., in, r)``.

    Returns:
        The product U, shape ``(..., out, r)``, float32.
    """
    if isinstance(weight, ShardedWeight) and weight.axis:
        return weight.summed(product(weight.part, lora_a[weight.own]))
    if isinstance(weight, ShardedWeight):
        return weight.gathered(product(weight.part, lora_a))
    if isinstance(weight, QuantizedWeight):
        rows = lora_a.astype(mx.float32).swapaxes(-1, -2)
        multiply = weight.matmul if lora_a.ndim == 2 else weight.packed_matmul
        return multiply(rows).astype(mx.float32).swapaxes(-1, -2)
    return (weight @ lora_a.astype(weight.dtype)).astype(mx.float32)


def base_products(
    weight: Weight, lora_a: mx.array, *, in_float64: bool = False
) -> tuple[Any, Any]:
    """Compute ‖W0‖² of each row and U = W0·A, reading W0 once in blocks.

    No float32 copy of W0 is held: each block is evaluated before the next is read.

    Args:
        weight: Base weight W0, shape ``(out, in)``, any float dtype or packed.
        lora_a: Down projection A, shape ``(in, R)``.
        in_float64: Return NumPy float64 arrays. Squares are summed to a relative
            accuracy of 1e-9. Products are float32, with rows and columns scaled near 1,
            so that nothing overflows or underflows.

    Returns:
        ‖W0‖², shape ``(out,)``, and U, shape ``(out, R)``, in float32 unless
        `in_float64`.
    """
    if isinstance(weight, ShardedWeight) and not in_float64:
        if weight.axis:
            parts = base_products(weight.part, lora_a[weight.own])
            return tuple(map(weight.summed, parts))
        own = base_products(weight.part, lora_a)
        return row_squares(weight), weight.gathered(own[1])
    a, columns = lora_a.astype(mx.float32), None
    if in_float64:
        a, columns = scaled_to_unit(a, axis=-2)
    squares: list[Any] = []
    products: list[Any] = []
    for _, block in row_blocks(weight):
        full = block.astype(mx.float32)
        if in_float64:
            square, product = _products_in_float64(full, a)
        else:
            square, product = squared_rows(full), full @ a
            mx.eval(square, product)
        squares.append(square)
        products.append(product)
        del full, block
    if columns is None:
        return mx.concatenate(squares), mx.concatenate(products)
    whole = np.concatenate(products) * np.array(columns, np.float64)
    return np.concatenate(squares), whole


def _products_in_float64(
    block: mx.array, lora_a: mx.array
) -> tuple[np.ndarray, np.ndarray]:
    """‖W0‖² and W0·A of a float32 block; rows are scaled if a square leaves float32."""
    product = block @ lora_a
    mx.eval(block, product)
    wide = np.array(block, copy=False).astype(np.float64)
    squares = row_dot(wide, wide)
    if not block.size or _within(squares):
        return squares, np.array(product, np.float64)
    block, power = scaled_to_unit(block, axis=-1)
    factor = np.array(power, np.float64)
    return squares, np.array(block @ lora_a, np.float64) * factor


def row_dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the inner product of each pair of rows, summed in the dtype of the rows.

    Args:
        first: Rows, float32 or float64. Shape ``(out, in)``.
        second: Rows of the same dtype and shape.

    Returns:
        Inner products in float64. Shape ``(out,)``.
    """
    return np.einsum("ij,ij->i", first, second).astype(np.float64, copy=False)


def _within(squares: np.ndarray) -> bool:
    return bool(squares.min() >= _LEAST_SQUARE and squares.max() <= _LARGEST_SQUARE)


def matrices(weight: Weight) -> list[Weight]:
    """Return the matrices of a stack ``(n, out, in)``, which share its memory.

    For a single matrix, return a list with that matrix.
    """
    if len(weight.shape) == 2:
        return [weight]
    assert not isinstance(weight, ShardedWeight)
    if not isinstance(weight, QuantizedWeight):
        return list(_slices(weight))
    none = [None] * weight.shape[0]
    biases = none if weight.biases is None else _slices(weight.biases)
    parts = zip(_slices(weight.weight), _slices(weight.scales), biases, strict=True)
    return [replace(weight, weight=w, scales=s, biases=b) for w, s, b in parts]


def _slices(stack: mx.array) -> list[mx.array]:
    # stack[i] would copy, so that the list would take the memory of the stack again.
    return [stack[i : i + 1].squeeze(0) for i in range(stack.shape[0])]


def stacked(weights: Sequence[Weight]) -> Weight:
    """Stack matrices of the same form: the inverse of `matrices`."""
    packed = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if not packed:
        return mx.stack([weight for weight in weights if isinstance(weight, mx.array)])
    biases = [weight.biases for weight in packed if weight.biases is not None]
    return replace(
        packed[0],
        weight=mx.stack([weight.weight for weight in packed]),
        scales=mx.stack([weight.scales for weight in packed]),
        biases=mx.stack(biases) if biases else None,
    )
