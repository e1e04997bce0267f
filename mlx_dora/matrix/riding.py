"""One product with W0 for the activations and for the columns of A.

A training step needs W0·x, and U = W0·A for the norm. With few tokens, most of the time
of a second product goes into reading W0 again (and unpacking it, if it is packed). The
rows of Aᵀ therefore ride along with the tokens: one product of [x; Aᵀ] gives both.
"""

from typing import Any, cast

import mlx.core as mx

from mlx_dora.matrix.packed import unpacks
from mlx_dora.matrix.weight import Weight, as_packed

# Below this many multiply-adds, the gain is under 0.1 ms. The base layer's own op is
# used there, whose results are bit-identical to the base's.
_SMALL_WORK = 1 << 21
# Stacking copies x. With more tokens per row of a dense W0, the copy takes as long as
# reading W0 again: benchmarks/bench_riding.py times whole steps with and without riders
# (docs/training.md, "Few tokens").
_TOKENS_PER_ROW = 0.25


def rides(base: Any, x: mx.array) -> bool:
    """Return whether one product of [x; Aᵀ] with W0 is faster than two products.

    This is True only where it was measured: in float32 on a CPU, with few tokens for
    the size of a dense weight, or with a packed weight that the product with `x`
    unpacks anyway.

    Args:
        base: A module with a matrix ``weight``, dense or packed.
        x: Activations, shape ``(..., in)``.
    """
    if "_row_squares" in base:  # the rows of other processes are not here
        return False
    if x.dtype != mx.float32 or mx.default_device().type != mx.DeviceType.cpu:
        return False
    weight, width = base["weight"], x.shape[-1]
    out, tokens = weight.shape[0], x.size // max(width, 1)
    if "scales" in base:
        return unpacks(x, (out, width))
    is_small = tokens * out * width <= _SMALL_WORK
    fits = tokens <= _TOKENS_PER_ROW * out
    return fits and not is_small and weight.dtype == mx.float32


def product_with_riders(
    weight: Weight, x: mx.array, lora_a: mx.array
) -> tuple[mx.array, mx.array]:
    """Return W0·x and U = W0·A from one product.

    Args:
        weight: Base weight W0, shape ``(out, in)``, dense or packed.
        x: Activations, shape ``(..., in)``, float32.
        lora_a: Down projection A, shape ``(in, r)``; no gradient flows to it.

    Returns:
        W0·x, shape ``(..., out)``, with the gradients of a plain product; and U, shape
        ``(out, r)``, a constant. Both are float32.
    """
    rows = mx.stop_gradient(lora_a.astype(mx.float32)).T
    packed = as_packed(weight)
    if packed is None:
        y, product = cast(
            tuple[mx.array, mx.array], _dense_with_riders(x, rows, weight)
        )
    else:
        y, product = _parted(packed.matmul(_stacked(x, rows)), x)
    return y, mx.stop_gradient(product).T


def _stacked(x: mx.array, rows: mx.array) -> mx.array:
    return mx.concatenate([x.reshape(-1, x.shape[-1]), rows])


def _parted(both: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    tokens = x.size // x.shape[-1]
    return both[:tokens].reshape(*x.shape[:-1], -1), both[tokens:]


@mx.custom_function
def _dense_with_riders(
    x: mx.array, rows: mx.array, weight: mx.array
) -> tuple[mx.array, mx.array]:
    return _parted(_stacked(x, rows) @ weight.T, x)


@_dense_with_riders.vjp
def _vjp(primals: Any, cotangents: Any, _outputs: Any) -> Any:
    # MLX's own gradient would also multiply the zero gradients of the riders.
    x, rows, weight = primals
    dy = cast(mx.array, cotangents[0])
    dw = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return dy @ weight, mx.zeros_like(rows), dw
