"""The eval-mode cache is never stale, and does not disturb gradients or tracing."""

import copy
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.layers import DoRALinear
from tests.checks import assert_close, to_numpy
from tests.layers.oracle import dense_weight, dora_truth, quantized, trained


@pytest.fixture(params=["dense", "quantized"])
def layer(request):
    mx.random.seed(0)
    linear = nn.Linear(128, 48)
    if request.param == "quantized":
        linear = quantized(linear, 64, 4)
    return trained(DoRALinear.from_base(linear, r=8, scale=2.0)).eval()


@pytest.fixture
def x():
    return mx.random.normal((3, 128), key=mx.random.key(7))


def truth(layer, x):
    cotangent = np.zeros((*x.shape[:-1], layer.m.size))
    args = to_numpy(layer.lora_a), to_numpy(layer.lora_b)
    bias = to_numpy(layer.linear.bias)
    weight = dense_weight(layer.linear)
    return dora_truth(
        to_numpy(x), weight, *args, layer.scale, to_numpy(layer.m), cotangent, bias
    ).out


def update_through_tree(layer):
    layer.update({"m": layer.m * 3})


def multiply_in_place(layer):
    layer.m *= 3


def assign_b(layer):
    layer.lora_b = layer.lora_b * 3


def change_scale(layer):
    layer.scale = 5.0


def write_into_array(layer):
    layer.m[0] = 9.0
    layer.invalidate()


def replace_bias(layer):
    layer.linear.bias = layer.linear.bias + 1


def replace_base(layer):
    layer.set_linear(nn.Linear(128, 48))


def load_base_weight(layer):
    base = nn.Linear(128, 48)
    layer.linear = base
    layer.update({"linear": {"weight": base.weight * 2}})
    layer.eval()


@pytest.mark.parametrize(
    "change",
    [
        update_through_tree,
        multiply_in_place,
        assign_b,
        change_scale,
        write_into_array,
        replace_bias,
        replace_base,
        load_base_weight,
    ],
)
def test_every_change_is_seen(layer, x, change):
    before = to_numpy(layer(x))
    change(layer)
    assert not np.allclose(to_numpy(layer(x)), before)
    assert_close(layer(x), truth(layer, x))
    layer.train()
    assert_close(layer(x), truth(layer, x))


def test_second_call_reuses_the_cache(layer, x):
    layer(x)
    first = layer._cache
    layer(x)
    assert layer._cache is first is not None
    layer(x.astype(mx.bfloat16))
    assert layer._cache is not first
    assert layer._cache.gain is first.gain


def test_train_and_eval_agree(layer, x):
    expected = truth(layer, x)
    assert_close(layer(x), expected)
    assert_close(layer.train()(x), expected)


@pytest.mark.compiled
def test_a_compiled_function_sees_new_parameters(layer, x):
    call = mx.compile(layer, inputs=layer.state)
    mx.eval(call(x))
    assert layer._cache is None  # no traced array was kept
    layer.m = layer.m * 2
    assert_close(call(x), truth(layer, x))


def test_gradients_flow_in_eval_mode(layer, x):
    layer(x)

    def loss(params):
        layer.update(params)
        return (layer(x) ** 2).sum()

    params = {k: layer[k] for k in ("lora_a", "lora_b", "m")}
    in_eval = mx.grad(loss)(params)
    layer.train()
    in_training = mx.grad(loss)(params)
    for name, gradient in in_training.items():
        assert_close(in_eval[name], to_numpy(gradient))
        assert mx.abs(gradient).max() > 0


def test_vmap_works_in_eval_mode(x):
    layer = trained(DoRALinear.from_base(nn.Linear(128, 48), scale=2.0)).eval()
    batched = mx.vmap(layer)(x[:, None])
    assert_close(batched[:, 0], truth(layer, x))


def test_cache_filled_in_one_thread_serves_another(layer, x):
    mx.eval(layer(x))
    results = []

    def serve():
        with mx.stream(mx.cpu):
            y = layer(mx.random.normal((3, 128), key=mx.random.key(7)))
            mx.eval(y)
        results.append(to_numpy(y))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert_close(results[0], truth(layer, x))


def test_a_layer_made_in_one_thread_is_used_first_in_another():
    layer = DoRALinear.from_base(nn.Linear(64, 32)).eval()
    mx.eval(layer.parameters())
    results = []

    def serve():
        y = layer(mx.ones((1, 64)))
        mx.eval(y)
        results.append(y.shape)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert results == [(1, 32)]


def test_disabled_layer_is_its_base_bit_for_bit(layer, x):
    layer.enabled = False
    assert mx.array_equal(layer(x), layer.linear(x))
    assert mx.array_equal(layer.train()(x), layer.linear(x))


def test_deep_copy_is_independent(layer, x):
    layer(x)
    twin = copy.deepcopy(layer)
    twin.m = twin.m * 2
    assert_close(twin(x), truth(twin, x))
    assert_close(layer(x), truth(layer, x))
