"""`reference.normalize_rows`, by its kernel where one pays."""

from functools import wraps
from typing import cast

import mlx.core as mx

from mlx_dora.kernels import reference
from mlx_dora.kernels._launch import KERNELS, relative_error, run, takes_kernel
from mlx_dora.kernels._table import plan_normalize_rows
from mlx_dora.kernels.rows import are_ordinary

_KERNEL = KERNELS["normalize_rows"]


@wraps(reference.normalize_rows)  # documented there
def normalize_rows(
    weight: mx.array, magnitude: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Rescale each output row to a given length."""
    if weight.ndim != 2 or not takes_kernel(
        "normalize_rows",
        elements=weight.size,
        rank=0,
        dtype=weight.dtype,
        check=lambda: _check(weight.dtype),
    ):
        return reference.normalize_rows(weight, magnitude)
    reference.check_magnitude(weight, magnitude)
    if magnitude is None:
        magnitude = mx.ones(weight.shape[:1])
    rescaled, norm = launched(weight, magnitude.astype(mx.float32))
    if are_ordinary(mx.square(norm)):
        return rescaled, norm
    # The kernel squares values as they are.
    return reference.normalize_rows(weight, magnitude)


def launched(weight: mx.array, magnitude: mx.array) -> tuple[mx.array, mx.array]:
    """The kernel's results, whatever the size; differentiable."""
    return cast(tuple[mx.array, mx.array], _differentiable(weight, magnitude))


@mx.custom_function
def _differentiable(weight: mx.array, magnitude: mx.array) -> tuple[mx.array, mx.array]:
    out, width = weight.shape
    launch = plan_normalize_rows((out, width), weight.dtype)
    rescaled, norm = run(_KERNEL, (weight, magnitude), launch)
    return rescaled, norm


@_differentiable.vjp
def _vjp(primals, cotangents, _outputs):
    _, gradients = mx.vjp(reference.normalize_rows, list(primals), list(cotangents))
    return tuple(gradients)


def _check(dtype: mx.Dtype) -> float:
    weight = mx.random.normal((9, 301), key=mx.random.key(0)).astype(dtype)
    magnitude = mx.arange(9, dtype=mx.float32)
    return relative_error(
        launched(weight, magnitude), reference.normalize_rows(weight, magnitude)
    )
