"""What holds for every variant, against float64."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRALinear
from mlx_dora.layers.variants import layer_class
from mlx_dora.layers.variants.registry import VARIANTS
from tests.checks import BOUNDS, assert_close, to_numpy
from tests.layers.oracle import dense_weight, quantized
from tests.layers.variants.oracle import (
    EQUATIONS,
    Params,
    direction,
    numeric_gradients,
    row_norms,
)

NAMES = sorted(VARIANTS)
SCALE = 2.0


def wrap(name: str, base: Any, r: int = 3, **settings: Any) -> Any:
    mx.random.seed(1)
    kind = layer_class(base, name)
    return kind.from_base(base, r=r, scale=SCALE, **settings)


def linear(width: int = 12, out: int = 9, bias: bool = True) -> nn.Linear:
    mx.random.seed(0)
    layer = nn.Linear(width, out, bias=bias)
    layer.freeze()
    return layer


def moved(layer: Any, size: float = 0.3) -> Any:
    """Every trained parameter a little away from its start."""
    rng = np.random.default_rng(2)
    for name, value in layer.trainable_parameters().items():
        if isinstance(value, mx.array):
            noise = rng.standard_normal(value.shape).astype(np.float32)
            factor = 1 + 0.1 * mx.array(noise)
            layer[name] = value * factor + size / SCALE * mx.array(noise)
    return layer


def parts(layer: Any) -> tuple[Params, Params]:
    trained = {
        name: to_numpy(value)
        for name, value in layer.trainable_parameters().items()
        if isinstance(value, mx.array)
    }
    return trained, {name: to_numpy(layer[name]) for name in layer.fixed}


def true_weight(name: str, layer: Any) -> np.ndarray:
    trained, fixed = parts(layer)
    weight = dense_weight(layer.linear)
    norm = row_norms(direction(name, trained, weight, SCALE, fixed))
    return EQUATIONS[name](trained, weight, norm, SCALE, fixed)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_match_float64_differences(name: str, bias: bool) -> None:
    layer = moved(wrap(name, linear(bias=bias)))
    trained, fixed = parts(layer)
    weight, b = dense_weight(layer.linear), 0.0
    if bias:
        b = to_numpy(layer.linear.bias)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 4, 12))
    pull = rng.standard_normal((2, 4, 9))
    norm = row_norms(direction(name, trained, weight, SCALE, fixed))

    def truth(p: Params) -> float:
        adapted = EQUATIONS[name](p, weight, norm, SCALE, fixed)
        return float(((x @ adapted.T + b) * pull).sum())

    inputs = mx.array(x.astype(np.float32))
    cotangent = mx.array(pull.astype(np.float32))
    assert_close(layer(inputs), x @ true_weight(name, layer).T + b)

    def loss(parameters: Any, x: mx.array) -> mx.array:
        layer.update(parameters)
        return (layer(x) * cotangent).sum()

    parameters = layer.trainable_parameters()
    gradients, dx = mx.grad(loss, argnums=(0, 1))(parameters, inputs)
    expected = numeric_gradients(truth, trained)
    assert set(expected) == {n for n, v in gradients.items() if isinstance(v, mx.array)}
    for one, value in expected.items():
        assert np.abs(value).max() > 1e-3
        assert_close(gradients[one], value, bound=3e-5)
    assert_close(dx, pull @ true_weight(name, layer))


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_layer_is_its_base(name: str, dtype: mx.Dtype) -> None:
    base = linear(64, 48)
    base.set_dtype(dtype)
    layer = wrap(name, base)
    x = mx.random.normal((3, 5, 64)).astype(dtype)
    for call in (layer, layer.eval()):
        if name == "pissa":  # A and B cancel A0 and B0 but for rounding
            assert_close(call(x), to_numpy(base(x)), dtype, bound=None)
        else:
            assert mx.array_equal(call(x), base(x))
        assert call(x).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_layer_learns(name: str) -> None:
    layer = wrap(name, linear())
    x = mx.random.normal((5, 12))
    gradients = nn.value_and_grad(layer, lambda x: (layer(x) ** 2).sum())(x)[1]
    arrays = {n: v for n, v in gradients.items() if isinstance(v, mx.array)}
    still = {name for name, value in arrays.items() if not mx.any(value != 0)}
    assert still <= {"lora_a"} | ({"lora_b"} if name == "map" else set())


@pytest.mark.parametrize("base", ["dense", "bias", "4-bit", "3-bit", "mxfp4"])
@pytest.mark.parametrize("name", NAMES)
def test_the_export_is_exact(name: str, base: str) -> None:
    module: Any = linear(128, 48, bias=base == "bias")
    if base not in ("dense", "bias"):
        mode = ("mxfp4", 4, 32) if base == "mxfp4" else ("affine", int(base[0]), 32)
        module = quantized(module, mode[2], mode[1], mode[0])
        module.freeze()
    layer = moved(wrap(name, module))
    x = mx.random.normal((7, 128))
    exported = layer.export()
    assert type(exported) is DoRALinear
    before = to_numpy(layer(x))
    for mode in (True, False):
        assert_close(exported.train(mode)(x), before, bound=3e-6)
    weight = true_weight(name, layer)
    assert_close(exported.fuse(dequantize=True).weight, weight, bound=8e-3)
    if base in ("dense", "bias"):
        assert_close(exported.fuse().weight, weight, bound=3e-6)
    assert exported.linear is module
    rank = {"pissa": 6, "magnitude": 1}.get(name, 3)
    assert exported.lora_a.shape == (128, rank)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_reaches_the_low_rank_branch_only(name: str) -> None:
    layer = wrap(name, linear(64, 48), dropout=0.5)
    x = mx.random.normal((5, 64))
    if name != "pissa":
        assert mx.array_equal(layer(x), layer.linear(x))
    moved(layer)
    if name != "magnitude":
        assert not mx.array_equal(layer(x), layer(x))
    layer.eval()
    assert mx.array_equal(layer(x), layer(x))
    layer.enabled = False
    assert mx.array_equal(layer(x), layer.linear(x))


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_row_gives_no_nan(name: str) -> None:
    base = linear()
    base.weight = mx.where(mx.arange(9)[:, None] == 4, 0.0, base.weight)
    layer = wrap(name, base)
    x = mx.random.normal((5, 12))
    gradients = nn.value_and_grad(layer, lambda x: (layer(x) ** 2).sum())(x)[1]
    for value in gradients.values():
        assert not isinstance(value, mx.array) or mx.isfinite(value).all()
    moved(layer)
    if name == "pissa":  # a row that the update alone makes
        return
    assert_close(layer.export()(x), to_numpy(layer(x)), bound=3e-6)


def test_an_embedding_is_refused_by_name() -> None:
    for name in NAMES:
        with pytest.raises(DoRAError, match=f"Embedding cannot take {name}, which"):
            layer_class(nn.Embedding(4, 3), name)


def test_what_no_adapter_can_say_is_refused() -> None:
    layer = wrap("prediag", linear())
    layer.d = mx.where(mx.arange(9) == 2, 0.0, layer.d)
    with pytest.raises(DoRAError, match="1 entries of d are exactly 0"):
        layer.export()
    layer = wrap("map", linear())
    layer.alpha = mx.array(0.0)
    with pytest.raises(DoRAError, match="alpha is exactly 0"):
        layer.export()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_negative_lengths_survive_the_export(sign: float) -> None:
    for name, leaf in (("map", "alpha"), ("prediag", "d"), ("doran", "m")):
        layer = moved(wrap(name, linear()))
        layer[leaf] = sign * layer[leaf]
        x = mx.random.normal((5, 12))
        assert_close(layer.export()(x), to_numpy(layer(x)), bound=3e-6)
