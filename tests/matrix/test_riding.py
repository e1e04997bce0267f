from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.riding import product_with_riders, rides
from mlx_dora.matrix.weight import Weight, dense, weight_of
from tests.checks import assert_close, to_numpy

OUT, WIDTH, RANK = 640, 512, 8


def linear(*, packed: bool = False) -> Any:
    mx.random.seed(0)
    base = nn.Linear(WIDTH, OUT, bias=False)
    return base.to_quantized(64, 4) if packed else base


def inputs(*shape: int) -> tuple[mx.array, mx.array]:
    mx.random.seed(1)
    return mx.random.normal((*shape, WIDTH)), mx.random.normal((WIDTH, RANK))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (40,), (3, 7)])
def test_both_products_match_float64(packed: bool, shape: tuple[int, ...]) -> None:
    weight = weight_of(linear(packed=packed))
    x, lora_a = inputs(*shape)
    y, product = product_with_riders(weight, x, lora_a)
    w0 = to_numpy(dense(weight))
    assert y.shape == (*shape, OUT)
    assert_close(y, to_numpy(x) @ w0.T)
    assert_close(product, w0 @ to_numpy(lora_a))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_the_product_alone(packed: bool) -> None:
    weight = weight_of(linear(packed=packed))
    x, lora_a = inputs(3, 7)
    dy = mx.random.normal((3, 7, OUT))

    def loss(x: mx.array, lora_a: mx.array) -> mx.array:
        y, product = product_with_riders(weight, x, lora_a)
        return (y * dy).sum() + product.sum()

    dx, da = mx.grad(loss, argnums=(0, 1))(x, lora_a)
    assert_close(dx, to_numpy(dy) @ to_numpy(dense(weight)))
    assert not da.any()


def test_a_base_that_is_trained_gets_its_gradient() -> None:
    x, lora_a = inputs(3, 7)
    dy = mx.random.normal((3, 7, OUT))

    def loss(weight: mx.array) -> mx.array:
        return (product_with_riders(weight, x, lora_a)[0] * dy).sum()

    expected = np.einsum("bto,bti->oi", to_numpy(dy), to_numpy(x))
    assert_close(mx.grad(loss)(linear().weight), expected)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, False), (12, True), (160, True), (161, False)]
)
def test_riders_join_neither_tiny_products_nor_many_tokens(
    tokens: int, expected: bool
) -> None:
    assert rides(linear(), inputs(tokens)[0]) is expected


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, False), (4, False), (12, True), (4000, True)]
)
def test_riders_join_only_products_that_unpack_w0(tokens: int, expected: bool) -> None:
    assert rides(linear(packed=True), inputs(tokens)[0]) is expected


@pytest.mark.parametrize("packed", [False, True])
def test_riders_stay_out_of_half_precision(packed: bool) -> None:
    x, base = inputs(12)[0], linear(packed=packed)
    assert not rides(base, x.astype(mx.bfloat16))
    if not packed:
        base.set_dtype(mx.bfloat16)
        assert not rides(base, x)


def test_a_packed_weight_is_unpacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    plain = QuantizedWeight.matmul

    def matmul(weight: QuantizedWeight, x: mx.array) -> mx.array:
        rows.append(x.shape[0])
        return plain(weight, x)

    monkeypatch.setattr(QuantizedWeight, "matmul", matmul)
    weight: Weight = weight_of(linear(packed=True))
    mx.eval(*product_with_riders(weight, *inputs(12)))
    assert rows == [12 + RANK]
