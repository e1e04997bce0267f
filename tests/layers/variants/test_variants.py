"""Checks every variant against float64."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRALinear
from mlx_dora.layers.wrap import VARIANTS, adapt, check_adaptable, is_adapted_as
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


# These names are in checkpoints: renaming them breaks resuming of earlier runs.
TRAINED = {
    "adaptive": {"lora_a", "lora_b", "m"},
    "doran": {"lora_a", "lora_b", "m", "t"},
    "doran-aux": {"lora_a", "lora_b", "m", "t", "first.a", "first.b"},
    "edora": {"core", "m"},
    "magnitude": {"m"},
    "map": {"lora_a", "lora_b", "alpha", "beta"},
    "pissa": {"lora_a", "lora_b", "m"},
    "prediag": {"lora_a", "lora_b", "d"},
}
FIXED = {
    "adaptive": {"active"},
    "edora": {"lora_a", "lora_b"},
    "pissa": {"start_a", "start_b"},
}


def wrap(name: str, base: Any, r: int = 3, **settings: Any) -> Any:
    mx.random.seed(1)
    return adapt(base, name, r=r, scale=SCALE, **settings)


def linear(width: int = 12, out: int = 9, bias: bool = True) -> nn.Linear:
    mx.random.seed(0)
    layer = nn.Linear(width, out, bias=bias)
    layer.freeze()
    return layer


def moved(layer: Any, size: float = 0.3) -> Any:
    """Move every trained parameter slightly away from its initial value."""
    rng = np.random.default_rng(2)
    changed = {}
    for name, value in trained(layer).items():
        noise = mx.array(rng.standard_normal(value.shape).astype(np.float32))
        changed[name] = value * (1 + 0.1 * noise) + size / SCALE * noise
    layer.update(tree_unflatten(list(changed.items())))
    return layer


def trained(layer: Any) -> dict[str, mx.array]:
    return arrays(layer.trainable_parameters())


def arrays(tree: Any) -> dict[str, mx.array]:
    flat = tree_flatten(tree)
    return {name: value for name, value in flat if isinstance(value, mx.array)}


def parts(layer: Any) -> tuple[Params, Params]:
    parameters = {name: to_numpy(value) for name, value in trained(layer).items()}
    return parameters, {name: to_numpy(layer[name]) for name in layer.kind.fixed}


def true_weight(name: str, layer: Any) -> np.ndarray:
    params, fixed = parts(layer)
    weight = dense_weight(layer.linear)
    norm = row_norms(direction(name, params, weight, SCALE, fixed))
    return EQUATIONS[name](params, weight, norm, SCALE, fixed)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_match_float64_differences(name: str, bias: bool) -> None:
    layer = moved(wrap(name, linear(bias=bias)))
    params, fixed = parts(layer)
    weight, b = dense_weight(layer.linear), 0.0
    if bias:
        b = to_numpy(layer.linear.bias)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 4, 12))
    pull = rng.standard_normal((2, 4, 9))
    norm = row_norms(direction(name, params, weight, SCALE, fixed))

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
    expected, actual = numeric_gradients(truth, params), arrays(gradients)
    assert set(expected) == set(actual)
    for key, value in expected.items():
        assert np.abs(value).max() > 1e-3
        assert_close(actual[key], value, bound=3e-5)
    assert_close(dx, pull @ true_weight(name, layer))


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_layer_is_its_base(name: str, dtype: mx.Dtype) -> None:
    base = linear(64, 48)
    base.set_dtype(dtype)
    layer = wrap(name, base)
    x = mx.random.normal((3, 5, 64)).astype(dtype)
    for call in (layer, layer.eval()):
        if name == "pissa":  # A and B cancel A0 and B0 up to rounding
            assert_close(call(x), to_numpy(base(x)), dtype, bound=None)
        else:
            assert mx.array_equal(call(x), base(x))
        assert call(x).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_parameters_keep_the_names_of_checkpoints(name: str) -> None:
    layer = wrap(name, linear())
    assert set(trained(layer)) == TRAINED[name]
    assert set(layer.kind.fixed) == FIXED.get(name, set())
    base = {"linear.weight", "linear.bias"}
    everything = TRAINED[name] | FIXED.get(name, set()) | base
    assert set(arrays(layer.parameters())) == everything


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_takes_no_other_base(name: str) -> None:
    with pytest.raises(DoRAError, match="cannot take another base"):
        wrap(name, linear()).set_base(linear())


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_layer_learns(name: str) -> None:
    layer = wrap(name, linear())
    x = mx.random.normal((5, 12))
    gradients = nn.value_and_grad(layer, lambda x: (layer(x) ** 2).sum())(x)[1]
    still = {name for name, value in arrays(gradients).items() if not mx.any(value)}
    late = {"map": {"lora_a", "lora_b"}, "doran-aux": {"lora_a", "first.a", "first.b"}}
    assert still <= late.get(name, {"lora_a"})


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
    assert is_adapted_as(layer, name)
    assert is_adapted_as(exported, "dora")
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
    for value in arrays(gradients).values():
        assert mx.isfinite(value).all()
    moved(layer)
    if name == "pissa":  # this row comes only from the update
        return
    assert_close(layer.export()(x), to_numpy(layer(x)), bound=3e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_change_is_seen_in_eval_mode(name: str) -> None:
    layer = moved(wrap(name, linear())).eval()
    x = mx.random.normal((5, 12))
    flat = {**trained(layer), **{key: layer[key] for key in layer.kind.fixed}}
    for key, value in flat.items():
        before = to_numpy(layer(x))
        factor = mx.random.uniform(1.3, 2.0, value.shape)
        layer.update(tree_unflatten([(key, value * factor)]))
        assert not np.allclose(to_numpy(layer(x)), before)
        expected = to_numpy(x) @ true_weight(name, layer).T
        assert_close(layer(x), expected + to_numpy(layer.linear.bias))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_linear_layer_is_refused_by_name(name: str) -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    others = (nn.Embedding(4, 32), nn.QuantizedEmbedding(4, 64), SwitchLinear(8, 6, 2))
    for module in others:
        kind = type(module).__name__
        with pytest.raises(DoRAError, match=f"{kind} cannot take {name}, which adapts"):
            check_adaptable(module, name)


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
