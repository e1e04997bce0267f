from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.layers.variants import WeightNormLinear
from tests.checks import assert_close, to_numpy
from tests.layers.variants.oracle import Params, numeric_gradients


def test_values_and_gradients_match_float64_differences() -> None:
    mx.random.seed(0)
    layer = WeightNormLinear(7, 5)
    layer.g = layer.g * 1.2 + 0.1
    flat = {name: to_numpy(layer[name]) for name in ("v", "g", "bias")}
    rng = np.random.default_rng(0)
    x, pull = rng.standard_normal((3, 7)), rng.standard_normal((3, 5))

    def out(p: Params) -> np.ndarray:
        length = np.linalg.norm(p["v"], axis=1, keepdims=True)
        return x @ (p["g"][:, None] * p["v"] / length).T + p["bias"]

    inputs = mx.array(x.astype(np.float32))
    cotangent = mx.array(pull.astype(np.float32))
    assert_close(layer(inputs), out(flat))

    def loss(x: mx.array) -> mx.array:
        return (layer(x) * cotangent).sum()

    gradients: Any = nn.value_and_grad(layer, loss)(inputs)[1]
    expected = numeric_gradients(lambda p: float((out(p) * pull).sum()), flat)
    for name, value in expected.items():
        assert_close(gradients[name], value, bound=3e-5)
    # Salimans & Kingma, Eq. 3: the gradient of v is orthogonal to v.
    product = (to_numpy(gradients["v"]) * flat["v"]).sum(1)
    assert np.abs(product).max() < 1e-5


def test_what_has_no_dense_weight_is_refused() -> None:
    others: tuple[Any, ...] = (nn.Linear(64, 32).to_quantized(), nn.Embedding(4, 3))
    for module in others:
        with pytest.raises(DoRAError, match=f"got a {type(module).__name__}"):
            WeightNormLinear.from_base(module)


def test_it_starts_from_a_linear_layer_and_becomes_one() -> None:
    base = nn.Linear(32, 16)
    base.weight = mx.where(mx.arange(16)[:, None] == 3, 0.0, base.weight)
    layer = WeightNormLinear.from_base(base)
    x = mx.random.normal((4, 32))
    assert_close(layer(x), to_numpy(base(x)), bound=1e-6)
    assert_close(layer.fuse()(x), to_numpy(layer(x)), bound=1e-6)
    gradient: Any = nn.value_and_grad(layer, lambda x: layer(x).sum())(x)[1]
    assert mx.isfinite(gradient["v"]).all()
