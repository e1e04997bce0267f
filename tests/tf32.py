"""A pytest plugin that multiplies float32 in TF32 on a CPU, as MLX does on some GPUs.

    pytest -p tests.tf32 -n 0 tests/layers

It rounds the factors of every float32 product, and of the products of its gradient, to
10 bits of mantissa. Packed products stay exact, as they do in MLX's CUDA build. With
it, the bounds of `tests.checks` are those of such a GPU: a test that fails here would
fail there too. Tests of memory are left out, because the rounded copies need memory.
"""

from typing import Any

import mlx.core as mx
import pytest

_matmul, _addmm, _operator = mx.matmul, mx.addmm, mx.array.__matmul__


def rounded(values: mx.array) -> mx.array:
    """Round to the nearest TF32 value, ties to even; other dtypes pass."""
    if values.dtype != mx.float32:
        return values
    bits = mx.view(values, mx.uint32)
    half = 0xFFF + ((bits >> 13) & 1)
    return mx.view((bits + half) & 0xFFFFE000, mx.float32)


@mx.custom_function
def _product(a: mx.array, b: mx.array) -> mx.array:
    return _matmul(rounded(a), rounded(b))


@_product.vjp
def _product_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
    a, b = primals
    da = _matmul(rounded(cotangent), rounded(b).swapaxes(-1, -2))
    db = _matmul(rounded(a).swapaxes(-1, -2), rounded(cotangent))
    return _unbroadcast(da, a), _unbroadcast(db, b)


def _unbroadcast(gradient: mx.array, primal: mx.array) -> mx.array:
    extra = gradient.ndim - primal.ndim
    if extra:
        gradient = gradient.sum(axis=list(range(extra)))
    axes = [i for i, n in enumerate(primal.shape) if n == 1 < gradient.shape[i]]
    return gradient.sum(axis=axes, keepdims=True) if axes else gradient


def product(a: mx.array, b: mx.array, **_: Any) -> mx.array:
    """Return a @ b, by TF32 for matrices in float32."""
    if a.dtype != mx.float32 or b.dtype != mx.float32 or min(a.ndim, b.ndim) < 2:
        return _matmul(a, b)
    return _product(a, b)  # pyright: ignore[reportReturnType]


def _sum(
    c: mx.array, a: mx.array, b: mx.array, alpha: float = 1.0, beta: float = 1.0
) -> mx.array:
    return beta * c + alpha * product(a, b)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests of memory."""
    items[:] = [item for item in items if "no_array_as_large" not in item.name]


def pytest_configure() -> None:
    """Put the rounded products in MLX's place."""
    import tests.checks as checks

    checks.IS_TF32 = True
    mx.matmul, mx.addmm = product, _sum
    mx.array.__matmul__ = product  # pyright: ignore[reportAttributeAccessIssue]
