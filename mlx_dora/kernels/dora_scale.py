"""`reference.dora_scale`, by its kernels where they pay, gradients included."""

from collections.abc import Callable
from functools import wraps
from typing import cast

import mlx.core as mx

from mlx_dora.kernels import reference
from mlx_dora.kernels._launch import (
    CROSSOVERS,
    KERNELS,
    relative_error,
    run,
    takes_kernel,
)
from mlx_dora.kernels._table import (
    plan_dora_scale,
    plan_dora_scale_backward,
    plan_dora_scale_columns,
)

_FORWARD = KERNELS["dora_scale"]
_BACKWARD = KERNELS["dora_scale_backward"]
_COLUMNS = KERNELS["dora_scale_columns"]


@wraps(reference.dora_scale)  # documented there
def dora_scale(
    y: mx.array,
    h: mx.array,
    lora_b: mx.array,
    scale: float,
    m: mx.array,
    norm: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    """Add the low-rank part, rescale every output, add the bias."""
    if not _takes(y, lora_b.shape[0]):
        return reference.dora_scale(y, h, lora_b, scale, m, norm, bias)
    reference.check_scale(y, h, lora_b, m, norm, bias)
    return launched(y, h, lora_b, scale, m, norm, bias)


def compose(
    y: mx.array, h: mx.array, up: mx.array, gain: mx.array, bias: mx.array | None
) -> mx.array:
    """`reference.compose`, by the kernel of `dora_scale` where one pays."""
    if y.size < CROSSOVERS["dora_scale"].elements or not _takes(y, up.shape[0]):
        return reference.compose(y, h, up, gain, bias)
    return launched(y, h, up, 1.0, gain, mx.ones_like(gain), bias)


def _takes(y: mx.array, rank: int) -> bool:
    return takes_kernel(
        "dora_scale",
        elements=y.size,
        rank=rank,
        dtype=y.dtype,
        check=lambda: _check(y.dtype),
    )


def launched(
    y: mx.array,
    h: mx.array,
    lora_b: mx.array,
    scale: float,
    m: mx.array,
    norm: mx.array,
    bias: mx.array | None,
) -> mx.array:
    """The kernel's output, whatever the size; differentiable."""
    r, out = lora_b.shape
    composed = _differentiable(
        y.reshape(-1, out),
        h.astype(y.dtype).reshape(-1, r),
        lora_b.astype(mx.float32),
        mx.array([scale], dtype=mx.float32),
        m.astype(mx.float32),
        norm.astype(mx.float32),
        None if bias is None else bias.astype(mx.float32),
    )
    return cast(mx.array, composed).reshape(y.shape)


@mx.custom_function
def _differentiable(
    y: mx.array,
    h: mx.array,
    lora_b: mx.array,
    scale: mx.array,
    m: mx.array,
    norm: mx.array,
    bias: mx.array | None,
) -> mx.array:
    (composed,) = run(
        _FORWARD,
        (y, h, lora_b, scale, m, norm, m if bias is None else bias),
        plan_dora_scale(_matrix(y), h.shape[1], y.dtype, bias is not None),
    )
    return composed


@_differentiable.vjp
def _vjp(primals, cotangent, output):
    y, h, lora_b, scale, m, norm, bias = primals
    scaled, partial = run(
        _BACKWARD,
        (cotangent, output, m, norm, m if bias is None else bias),
        plan_dora_scale_backward(_matrix(y), y.dtype, bias is not None),
    )
    (sums,) = run(_COLUMNS, (partial, m), plan_dora_scale_columns(*partial.shape))
    # A sum over tokens can leave float16's range; bfloat16 has float32's.
    wide = mx.float32 if y.dtype == mx.float16 else y.dtype
    pull = scaled.astype(wide)
    return (
        scaled,
        (scale * (pull @ lora_b.astype(wide).T)).astype(h.dtype),
        scale * (h.astype(wide).T @ pull),
        mx.zeros_like(scale),  # MLX drops None, and would shift the rest
        sums[0],
        mx.zeros_like(norm),
        None if bias is None else sums[1],
    )


def _matrix(y: mx.array) -> tuple[int, int]:
    tokens, out = y.shape
    return tokens, out


def _check(dtype: mx.Dtype) -> float:
    """Forward and all gradients, with and without a bias."""
    keys = mx.random.split(mx.random.key(0), 5)
    y = mx.random.normal((70, 133), key=keys[0]).astype(dtype)
    h = mx.random.normal((70, 5), key=keys[1]).astype(dtype)
    b, pull = (mx.random.normal((n, 133), key=keys[n % 3 + 2]) for n in (5, 70))
    m = mx.arange(133, dtype=mx.float32) - 3
    norm = 1 + mx.random.uniform(shape=(133,), key=keys[4])
    worst = 0.0
    for bias in (None, m / 100):

        def all_of(op: Callable[..., mx.array], bias=bias) -> list[mx.array]:
            def loss(y: mx.array, h: mx.array, b: mx.array, m: mx.array) -> mx.array:
                return (op(y, h, b, 0.5, m, norm, bias).astype(mx.float32) * pull).sum()

            gradients = mx.grad(loss, argnums=(0, 1, 2, 3))(y, h, b, m)
            return [op(y, h, b, 0.5, m, norm, bias), *gradients]

        worst = max(
            worst, relative_error(all_of(launched), all_of(reference.dora_scale))
        )
    return worst
