"""Every op in tuned MLX, for the CPU and for a GPU where no kernel is faster.

`naive` specifies each op. The public ops document them and check arguments.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import mlx.core as mx

from mlx_dora.matrix.low_rank import LowRank
from mlx_dora.matrix.riding import product_with_riders
from mlx_dora.matrix.terms import Terms, floored_norm, row_gain, terms_of
from mlx_dora.matrix.weight import (
    Weight,
    are_ordinary,
    matrices,
    measured_rows,
    product,
    row_blocks,
    row_squares,
    scaled_to_unit,
)


def normalize_rows(
    weight: mx.array, magnitude: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Return m·W/‖W‖ and ‖W‖ of each row."""
    full, norm, power = measured_rows(weight)
    target = mx.ones_like(norm) if magnitude is None else magnitude
    gain = row_gain(target, norm)
    rescaled = (gain[:, None] * full).astype(weight.dtype)
    return rescaled, norm if power is None else norm * power


def adapted_norm(
    weight: Weight,
    lora_a: mx.array,
    lora_b: mx.array,
    scale: float,
    *,
    squared_base: mx.array | None = None,
) -> mx.array:
    """Return ‖W + s·BA‖ of each row from factored terms, at least their noise level.

    This accepts stacks of matrices too: every shape may have a leading axis.
    """
    update = LowRank(
        lora_a=mx.stop_gradient(lora_a), lora_b=mx.stop_gradient(lora_b), scale=scale
    )
    q0 = row_squares(weight) if squared_base is None else squared_base
    terms = terms_of(q0, product(weight, update.lora_a), update)
    if squared_base is None:  # the range of the squares is unknown
        largest = mx.square(mx.abs(update.lora_a).astype(mx.float32).max(axis=-2))
        sizes = [values.reshape(-1) for values in (q0, largest, terms.parts)]
        if not are_ordinary(mx.concatenate(sizes)):
            pairs = zip(matrices(weight), update.matrices(), strict=True)
            norms = [_scaled_norm(*pair) for pair in pairs]
            norm = norms[0] if len(weight.shape) == 2 else mx.stack(norms)
            return mx.stop_gradient(norm)
    return mx.stop_gradient(floored_norm(terms))


def product_and_norm(
    x: mx.array,
    weight: Weight,
    lora_a: mx.array,
    lora_b: mx.array,
    scale: float,
    squared_base: mx.array,
) -> tuple[mx.array, mx.array]:
    """Return W0·x and `adapted_norm`, from one product with W0; see `riding`."""
    update = LowRank(
        lora_a=mx.stop_gradient(lora_a), lora_b=mx.stop_gradient(lora_b), scale=scale
    )
    y, product = product_with_riders(weight, x, lora_a)
    norm = floored_norm(terms_of(squared_base, product, update))
    return y, mx.stop_gradient(norm)


def _scaled_norm(weight: Weight, update: LowRank) -> mx.array:
    """Compute `adapted_norm` with rows of W and BA, and columns of A, scaled near 1."""
    scaled = update.with_unit_columns()
    up, up_power = scaled_to_unit(
        update.scale * scaled.lora_b.swapaxes(-1, -2), axis=-1
    )
    blocks = [measured_rows(block) for _, block in row_blocks(weight)]
    q0 = mx.concatenate([mx.square(norm) for _, norm, _ in blocks])
    products = mx.concatenate([full @ scaled.lora_a for full, _, _ in blocks])
    power = mx.concatenate(
        [
            mx.ones_like(norm) if block_power is None else block_power
            for _, norm, block_power in blocks
        ]
    )
    unit = LowRank(lora_a=scaled.lora_a, lora_b=up.swapaxes(-1, -2), scale=1.0)
    terms = terms_of(q0, products, unit)
    larger = mx.maximum(power, up_power[:, 0])
    share, up_share = power / larger, up_power[:, 0] / larger
    shared = Terms(
        q0=terms.q0 * share * share,
        c=terms.c * share * up_share,
        p=terms.p * up_share * up_share,
        scale=1.0,
    )
    return floored_norm(shared) * larger


# Elements of a block of s·BA. OpenBLAS sums in an order that depends on its number of
# rows, and a fuse is to give the same bits again.
_PRODUCT = 1 << 16


def _shifted(part: slice, index: slice) -> slice:
    """Rows `part` of the rows `index`."""
    return slice(index.start + part.start, index.start + part.stop)


def fused_weight(
    weight: Weight, lora_a: mx.array, lora_b: mx.array, scale: float, m: mx.array
) -> mx.array:
    """Return m·(W + s·BA)/‖W + s·BA‖, computed in blocks of rows, rounded once."""
    update = LowRank(lora_a=lora_a, lora_b=lora_b, scale=scale)
    rows = []
    for index, block in row_blocks(weight):
        adapted = mx.concatenate(
            [
                update.added_to(rows.astype(mx.float32), _shifted(part, index))
                for part, rows in row_blocks(block, _PRODUCT)
            ]
        )
        rescaled, _ = normalize_rows(adapted, m[index].astype(mx.float32))
        rows.append(rescaled.astype(block.dtype))
    return rows[0] if len(rows) == 1 else mx.concatenate(rows)


@partial(mx.compile, shapeless=True)
def _rounded_once(
    y: mx.array, low_rank: mx.array, gain: mx.array, offset: mx.array | None
) -> mx.array:
    out = gain * (y.astype(mx.float32) + low_rank)
    return (out if offset is None else out + offset).astype(y.dtype)


def compose(
    y: mx.array,
    h: mx.array,
    up: mx.array,
    gain: mx.array,
    offset: mx.array | None,
    scale: float = 1.0,
) -> mx.array:
    """Return ``g∘(y + s·h·up) + offset`` like `rescale`, with MLX's own gradients."""
    h = h.astype(mx.float32)
    if y.dtype != mx.float32:
        return _rounded_once(y, _scaled(h, scale) @ up, gain, offset)
    # The sum and s need no separate pass.
    out = gain * mx.addmm(y, h, up, alpha=scale)
    return out if offset is None else out + offset


def _scaled(h: mx.array, scale: float) -> mx.array:
    return h if scale == 1 else scale * h


_rescale = mx.custom_function(compose)


def _rescale_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    _, h, up, gain, offset, *rest = primals
    scale = rest[0] if rest else 1.0
    axes = list(range(cotangent.ndim - 1))
    dy = cotangent.astype(mx.float32)
    scaled = gain * dy
    rows = scaled.reshape(-1, scaled.shape[-1])
    low = _scaled(h.reshape(-1, h.shape[-1]).astype(mx.float32), scale)
    # dg = Σ dy·u, and g·u is the output before the offset: only the output is needed.
    out = output.astype(mx.float32)
    unscaled = dy * (out if offset is None else out - offset)
    safe = mx.where(gain != 0, gain, 1.0)
    return (
        scaled.astype(cotangent.dtype),
        _scaled(scaled @ up.T, scale).astype(h.dtype),
        low.T @ rows,
        mx.where(gain != 0, unscaled.sum(axis=axes) / safe, 0.0),
        None if offset is None else dy.sum(axis=axes),
    )


_rescale.vjp(_rescale_vjp)


@mx.custom_function
def _rescale_known(*arguments: Any) -> mx.array:
    return arguments[-1]


@_rescale_known.vjp
def _(primals: Any, cotangent: mx.array, _output: mx.array) -> Any:
    *inputs, known = primals
    return *_rescale_vjp(inputs, cotangent, known), mx.zeros_like(known)


rescale_known = cast(Callable[..., mx.array], _rescale_known)
"""`rescale` where its output is known already: the last argument, a constant.

The gradients are those of `rescale`. Where only they are needed, y is not computed.
"""

rescale = cast(Callable[..., mx.array], _rescale)
"""``g∘(y + s·h·up) + offset`` in float32, rounded once to the dtype of `y`.

The arguments are those of `compose`, in their order. It is differentiable in all
arrays. The gradient of g needs only the output, and is 0 where g is 0. `up`, `gain` and
`offset` are float32; `offset` may be None. s·up is not built, since it would be kept
for the backward pass.
"""
