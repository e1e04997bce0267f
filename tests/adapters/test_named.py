from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora import disabled, fuse_dora
from mlx_dora.adapters.adapter import Adapter, take_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.named import NamedAdapters
from mlx_dora.adapters.surgery import adapter_layers, put_modules, remove_dora
from mlx_dora.errors import DoRAError
from tests.adapters.training import QV, TOKENS, perturb, train
from tests.checks import assert_close, to_numpy

Make = Callable[..., nn.Module]
CONFIGS = {
    "poet": DoRAConfig(num_layers=2, keys=QV, rank=3),
    "coder": DoRAConfig(
        num_layers=1, rank=5, scale=4.0,
        keys=("self_attn.q_proj", "mlp.up_proj", "model.embed_tokens"),
    ),
}  # fmt: skip
Q1 = "model.layers.1.self_attn.q_proj"


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    adapters = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        train(model, config)
        perturb(model, 0.01 * (seed + 1))
        adapters[name] = take_adapter(model)
        remove_dora(model)
    train(model, CONFIGS["poet"], kind="lora")
    adapters["plain"] = take_adapter(model)
    remove_dora(model)
    return adapters


def alone(model: nn.Module, adapter: Adapter) -> mx.array:
    from mlx_dora.adapters.attach import attach_adapter

    attach_adapter(model, adapter)
    model.eval()
    logits = model(TOKENS)
    mx.eval(logits)
    remove_dora(model)
    return logits


def weights_of(model: nn.Module, path: str) -> np.ndarray:
    """Return the adapted weight of a module in float64."""
    layer = dict(model.named_modules())[path]
    if "m" not in layer:
        return to_numpy(layer["weight"])
    w, m = to_numpy(layer.base["weight"]), to_numpy(layer["m"])
    down, up = (to_numpy(value) for value in layer.factors())
    moved = w + layer.scale * up.T @ down.T
    return m[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)


@pytest.fixture
def shelf(tiny_model: nn.Module) -> NamedAdapters:
    adapters = adapters_of(tiny_model)
    named = NamedAdapters(tiny_model)
    for name, adapter in adapters.items():
        named.add(name, adapter)
    return named


@pytest.mark.parametrize("bits", [None, 4])
def test_each_adapter_computes_the_same_as_alone(
    make_tiny_model: Make, bits: int | None
) -> None:
    model = make_tiny_model(bits=bits)
    model.eval()
    base = model(TOKENS)
    adapters = adapters_of(model)
    expected = {name: alone(model, adapter) for name, adapter in adapters.items()}
    named = NamedAdapters(model)
    for name, adapter in adapters.items():
        named.add(name, adapter)
        assert mx.array_equal(model(TOKENS), base)
    for name in ("poet", "coder", "plain", "poet", "plain"):
        named.set_adapter(name)
        assert named.active == {name: 1.0}
        # mlx-lm's own LoRA layer sums in a different order.
        assert_close(model(TOKENS), to_numpy(expected[name]))
    named.set_adapter(None)
    assert mx.array_equal(model(TOKENS), base)
    assert adapter_layers(model) == []


@pytest.mark.parametrize(
    "weights",
    [
        {"poet": 0.5},
        {"poet": 0.7, "coder": 0.3},
        {"coder": 1.5, "poet": -0.4, "plain": 0.25},
        {"poet": 1.0, "coder": 1.0},
    ],
    ids=str,
)
def test_blend_is_the_weighted_sum_of_the_changes(
    tiny_model: nn.Module, shelf: NamedAdapters, weights: dict[str, float]
) -> None:
    paths = {path for name in ("poet", "coder") for path in shelf_paths(shelf, name)}
    shelf.set_adapter(None)
    base = {path: weights_of(tiny_model, path) for path in paths}
    expected = dict(base)
    for name, weight in weights.items():
        shelf.set_adapter(name)
        for path in paths:
            change = weights_of(tiny_model, path) - base[path]
            expected[path] = expected[path] + weight * change
    shelf.set_adapter(weights)
    for path in paths:
        blended = weights_of(tiny_model, path)
        change = expected[path] - base[path]
        error = np.linalg.norm(blended - expected[path])
        assert error <= 1e-5 * max(np.linalg.norm(change), np.linalg.norm(base[path]))
    # The model also computes with those weights.
    logits = tiny_model(TOKENS)
    fuse_dora(tiny_model)
    assert_close(logits, to_numpy(tiny_model(TOKENS)))


def shelf_paths(shelf: NamedAdapters, name: str) -> list[str]:
    shelf.set_adapter(name)
    return [path for path, _ in adapter_layers(shelf._model)]


def test_swapping_reads_the_base_once(
    tiny_model: nn.Module, shelf: NamedAdapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_dora.layers import _layer

    blend = import_module("mlx_dora.matrix.blend")
    for name in ("poet", "coder"):
        shelf.set_adapter(name)

    def read(*_: object) -> None:
        raise AssertionError("the base was read again")

    for module in (blend, _layer):
        monkeypatch.setattr(module, "exact_terms", read)
    for which in ("poet", "coder", {"poet": 0.5, "coder": 0.5}, None, "poet"):
        shelf.set_adapter(which)
        mx.eval(tiny_model(TOKENS))


def test_cached_norms_are_removed_with_their_adapter(
    tiny_model: nn.Module, shelf: NamedAdapters
) -> None:
    shelf.set_adapter("poet")
    layer = dict(tiny_model.named_modules())[Q1]
    before = tiny_model(TOKENS)
    layer.lora_b = 3 * layer.lora_b
    weight = mx.array(weights_of(tiny_model, Q1).astype(np.float32))
    x = mx.random.normal((2, 32))
    assert_close(layer(x), to_numpy(x) @ to_numpy(weight).T)
    assert not mx.array_equal(tiny_model(TOKENS), before)


def test_a_blend_is_an_adapter_to_save(
    tiny_model: nn.Module, shelf: NamedAdapters, tmp_path: Path
) -> None:
    shelf.set_adapter({"poet": 0.6, "coder": 0.4})
    expected = tiny_model(TOKENS)
    with disabled(tiny_model):
        base = tiny_model(TOKENS)
    save_adapter(tiny_model, tmp_path / "blend")
    shelf.add("both", tmp_path / "blend")
    shelf.set_adapter("both")
    assert_close(tiny_model(TOKENS), to_numpy(expected))
    shelf.set_adapter(None)
    assert mx.array_equal(tiny_model(TOKENS), base)


def test_bad_calls_keep_the_active_adapter(
    tiny_model: nn.Module, shelf: NamedAdapters, make_tiny_model: Make
) -> None:
    shelf.set_adapter("coder")
    expected = tiny_model(TOKENS)
    other = make_tiny_model(seed=4)
    train(other, CONFIGS["poet"])
    cases = [
        (lambda: shelf.set_adapter("nobody"), "no adapter named 'nobody'; there are:"),
        (lambda: shelf.add("poet", "somewhere"), "named 'poet' already"),
        (lambda: shelf.remove("coder"), "'coder' is active"),
        (lambda: shelf.remove("nobody"), "no adapter named"),
        (lambda: shelf.add("new", take_adapter(other)), "new does not fit the model"),
        (lambda: NamedAdapters(tiny_model), "adapted layers already"),
    ]
    for call, message in cases:
        with pytest.raises(DoRAError, match=message):
            call()
        assert shelf.active == {"coder": 1.0}
        assert mx.array_equal(tiny_model(TOKENS), expected)
    assert shelf.names == ["poet", "coder", "plain"]
    shelf.remove("poet")
    assert shelf.names == ["coder", "plain"]


def test_weights_that_cancel_the_base_are_refused(tiny_model: nn.Module) -> None:
    train(tiny_model, CONFIGS["poet"])
    layer = dict(tiny_model.named_modules())[Q1]
    layer.m = 2 * layer.norm()  # g = 2, and 1 − (2 − 1) = 0
    adapter = take_adapter(tiny_model)
    remove_dora(tiny_model)
    named = NamedAdapters(tiny_model)
    named.add("double", adapter)
    with pytest.raises(DoRAError, match=rf"{Q1}: these weights cancel 32 rows"):
        named.set_adapter({"double": -1.0})
    assert named.active == {}


def test_zero_rows_stay_zero_in_a_blend(tiny_model: nn.Module) -> None:
    linear = dict(tiny_model.named_modules())[Q1]
    weight = linear["weight"]
    weight[3] = 0
    linear.weight = weight
    train(tiny_model, CONFIGS["poet"])
    layer = dict(tiny_model.named_modules())[Q1]
    up = layer.lora_b
    up[:, 3] = 0
    layer.lora_b = up
    adapter = take_adapter(tiny_model)
    remove_dora(tiny_model)
    named = NamedAdapters(tiny_model)
    named.add("a", adapter)
    named.set_adapter({"a": 0.5})
    assert mx.isfinite(tiny_model(TOKENS)).all()
    out = dict(tiny_model.named_modules())[Q1](mx.ones((1, 32)))
    assert out[0, 3].item() == 0


def test_layers_of_an_adapter_leave_the_model_as_it_is(tiny_model: nn.Module) -> None:
    adapters = adapters_of(tiny_model)
    expected = alone(tiny_model, adapters["coder"])
    before = tiny_model(TOKENS)
    named = NamedAdapters(tiny_model)
    for name, adapter in adapters.items():
        named.add(name, adapter)
    layers = named.layers("coder")
    others = named.layers("poet")
    assert mx.array_equal(tiny_model(TOKENS), before)
    assert layers.keys() == set(adapters["coder"].paths)
    assert layers[Q1] is not others[Q1]
    assert layers[Q1].base is others[Q1].base
    put_modules(tiny_model, list(layers.items()))
    assert_close(tiny_model(TOKENS), to_numpy(expected))
    with pytest.raises(DoRAError, match="no adapter named"):
        named.layers("nobody")


def test_rows_that_nearly_cancel_are_computed_densely() -> None:
    from mlx_dora.matrix import Adapted, LowRank, blend, measured

    mx.random.seed(0)
    w = mx.random.normal((6, 4))
    up = mx.random.normal((4, 6))
    # W0 + 0.999·(−W0) leaves a thousandth of each row.
    down, scale = -(mx.linalg.pinv(up.T, stream=mx.cpu) @ w).T, 1.0
    update = LowRank(lora_a=down, lora_b=up, scale=scale)
    found = blend(w, [(0.999, measured(w, Adapted(update=update, m=None)))])
    a, b = to_numpy(found.update.lora_a), to_numpy(found.update.lora_b)
    exact = np.linalg.norm(to_numpy(w) + (a @ b).T, axis=1)
    np.testing.assert_allclose(to_numpy(found.terms.norm), exact, rtol=2e-3)
