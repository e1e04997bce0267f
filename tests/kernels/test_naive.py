"""Compares values and gradients of `plain` ops with their specification."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora.kernels import naive, plain
from tests.checks import BOUNDS, assert_close, to_numpy

DTYPES = list(BOUNDS)


def normal(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def assert_same(
    ours: Callable[..., Any], theirs: Callable[..., Any], dtype: mx.Dtype, *args: Any
) -> None:
    for actual, expected in zip(ours(*args), theirs(*args), strict=True):
        assert actual.dtype == expected.dtype
        assert_close(actual, to_numpy(expected), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_norms(dtype: mx.Dtype) -> None:
    weight, m = normal(33, 65, dtype=dtype), normal(33, seed=3)
    a, b = normal(65, 4, seed=1), 0.1 * normal(4, 33, seed=2)
    assert_same(plain.normalize_rows, naive.normalize_rows, dtype, weight, m)
    assert_same(
        lambda *args: [plain.fused_weight(*args)],
        lambda *args: [naive.fused_weight(*args)],
        dtype,
        *(weight, a, b, 0.5, m),
    )
    norm = naive.adapted_norm(weight, a, b, 0.5)
    assert_close(plain.adapted_norm(weight, a, b, 0.5), to_numpy(norm), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_offset", [False, True])
def test_rescale_and_all_its_gradients(dtype: mx.Dtype, has_offset: bool) -> None:
    inputs = [
        normal(2, 7, 33, dtype=dtype),
        normal(2, 7, 5, seed=1, dtype=dtype),
        normal(5, 33, seed=2),
        1 + 0.1 * normal(33, seed=3),
    ]
    inputs += [0.1 * normal(33, seed=4)] * has_offset
    pull = normal(2, 7, 33, seed=5).astype(dtype)

    def with_gradients(op: Callable[..., mx.array]) -> Callable[..., list[mx.array]]:
        def run(*inputs: mx.array) -> list[mx.array]:
            def padded(*given: mx.array) -> mx.array:
                return op(*given, *[None] * (5 - len(given)))

            outputs, gradients = mx.vjp(padded, list(inputs), [pull])
            return [*outputs, *gradients]

        return run

    ours, theirs = with_gradients(plain.rescale), with_gradients(naive.rescale)
    assert_same(ours, theirs, dtype, *inputs)


def test_a_gain_of_zero_is_frozen_there() -> None:
    gain = mx.array([0.0, 2.0])
    y, h, up = mx.ones((3, 2)), mx.ones((3, 1)), mx.ones((1, 2))
    gradient = mx.grad(lambda g: plain.rescale(y, h, up, g, None).sum())(gain)
    assert gradient.tolist() == [0.0, 6.0]
