from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.kernels import plain
from mlx_dora.layers import DoRALinear
from mlx_dora.layers.linear import project_with_norm
from mlx_dora.matrix import Adapted
from mlx_dora.matrix.riding import rides
from tests.checks import BOUNDS, IS_TF32, assert_close, relative_rms, to_numpy
from tests.layers.oracle import (
    QUANTIZED_MODES,
    dense_weight,
    dora_truth,
    quantized,
    trained,
    value_and_gradients,
)

DTYPES = list(BOUNDS)


def check(layer, x, *, mask=None, dtype, bound=None):
    rng = np.random.default_rng(1)
    base = layer.base
    cotangent = rng.standard_normal((*x.shape[:-1], layer.m.shape[0]))
    cotangent = cotangent.astype(np.float32)
    truth = dora_truth(
        to_numpy(x),
        dense_weight(base),
        to_numpy(layer.lora_a),
        to_numpy(layer.lora_b),
        layer.scale,
        to_numpy(layer.m),
        cotangent.astype(np.float64),
        to_numpy(base.bias) if "bias" in base else None,
        None if mask is None else to_numpy(x) * mask,
    )
    if mask is not None:
        mx.random.seed(3)
    out, gradients, dx = value_and_gradients(layer, x, cotangent)
    if mask is None:  # with dropout the two passes draw different masks
        assert_close(out, truth.out, dtype, bound)
    assert out.dtype == x.dtype
    for name in ("lora_a", "lora_b", "m"):
        assert_close(gradients[name], getattr(truth, name), dtype, bound)
        assert gradients[name].dtype == mx.float32
    assert_close(dx, truth.x, dtype, bound)


def dense(in_dims, out_dims, *, bias=False, dtype=mx.float32, r=8, dropout=0.0):
    mx.random.seed(0)
    linear = nn.Linear(in_dims, out_dims, bias=bias)
    linear.set_dtype(dtype)
    return trained(DoRALinear.from_base(linear, r=r, dropout=dropout, scale=2.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 8, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("in_dims", "out_dims"), [(96, 80), (33, 31), (257, 3)])
def test_dense_forward_and_gradients_match_float64(in_dims, out_dims, bias, r, dtype):
    layer = dense(in_dims, out_dims, bias=bias, dtype=dtype, r=r)
    check(layer, mx.random.normal((3, 7, in_dims)).astype(dtype), dtype=dtype)


@pytest.mark.parametrize(("mode", "bits", "group"), QUANTIZED_MODES)
@pytest.mark.parametrize("bias", [False, True])
def test_quantized_forward_and_gradients_match_float64(mode, bits, group, bias):
    mx.random.seed(0)
    linear = quantized(nn.Linear(256, 96, bias=bias), group, bits, mode)
    layer = trained(DoRALinear.from_base(linear, r=8, scale=2.0))
    check(layer, mx.random.normal((2, 5, 256)), dtype=mx.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantized_half_precision_matches_float64(bits, dtype):
    mx.random.seed(0)
    linear = nn.Linear(256, 96)
    linear.set_dtype(dtype)
    base = quantized(linear, 64, bits)
    layer = trained(DoRALinear.from_base(base, scale=2.0))
    x = mx.random.normal((2, 5, 256)).astype(dtype)
    # MLX's CPU quantized_matmul accumulates in half precision. The base's own error
    # stays, so that an untrained layer equals its base; our error adds to it.
    own = relative_rms(
        base(x), to_numpy(x) @ dense_weight(base).T + to_numpy(base.bias)
    )
    check(layer, x, dtype=dtype, bound=BOUNDS[dtype] + 1.5 * own)


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.compiled)]
)
def test_unpacking_path_matches_float64(compiled):
    mx.random.seed(0)
    linear = quantized(nn.Linear(512, 256), 64, 4)
    layer = trained(DoRALinear.from_base(linear, scale=2.0))
    x = mx.random.normal((40, 512))  # large enough that the CPU unpacks
    if compiled:
        call = mx.compile(layer, inputs=layer.state, outputs=layer.state)
        mx.eval(call(x))
    check(layer, x, dtype=mx.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.compiled)]
)
def test_a_norm_from_the_product_of_the_tokens_matches_float64(bias, bits, compiled):
    layer = riding_layer(bias=bias, bits=bits)
    x = mx.random.normal((2, 8, 512))
    assert rides(layer.linear, x)
    if compiled:
        call = mx.compile(layer, inputs=layer.state, outputs=layer.state)
        mx.eval(call(x))
    check(layer, x, dtype=mx.float32)


def riding_layer(*, bias=False, bits=None):
    """A layer so large that riders join the product of 16 tokens."""
    mx.random.seed(0)
    linear = nn.Linear(512, 640, bias=bias)
    base = linear if bits is None else quantized(linear, 64, bits)
    return trained(DoRALinear.from_base(base, r=8, scale=2.0))


@pytest.mark.parametrize("bits", [None, 4])
def test_a_training_pass_multiplies_w0_once(bits, monkeypatch):
    layer = riding_layer(bits=bits)
    monkeypatch.setattr(plain, "product", None)  # a second product would fail
    x = mx.random.normal((2, 8, 512))
    mx.eval(layer(x))
    with pytest.raises(TypeError):
        layer.norm()


def test_a_held_norm_is_used():
    layer = riding_layer()
    x = mx.random.normal((2, 8, 512))
    expected = to_numpy(layer(x))
    layer.hold_norm()
    layer._norm = 2 * layer["_norm"]
    assert_close(layer(x), expected / 2)


def test_a_riding_norm_is_recomputed_with_its_block():
    layer = riding_layer()
    x, dy = mx.random.normal((2, 8, 512)), mx.random.normal((2, 8, 640))

    def loss(run, params, x):
        layer.update(params)
        return (run(x) * dy).sum()

    params = {name: layer[name] for name in ("lora_a", "lora_b", "m")}
    plain_way = mx.grad(lambda p, x: loss(layer, p, x), argnums=(0, 1))(params, x)

    def inner(params, x):
        layer.update(params)
        return layer(x)

    again = mx.checkpoint(inner)
    other = mx.grad(lambda p, x: (again(p, x) * dy).sum(), argnums=(0, 1))(params, x)
    for name, value in plain_way[0].items():
        assert_close(other[0][name], to_numpy(value))
    assert_close(other[1], to_numpy(plain_way[1]))


def test_rows_that_nearly_cancel_keep_the_floor_when_riding():
    layer = riding_layer()
    x = mx.random.normal((2, 8, 512))
    # BA = -W0 in row 0, up to rounding: A holds the row itself.
    row = layer.linear.weight[0]
    layer.lora_a = mx.concatenate([row[:, None], layer.lora_a[:, 1:]], axis=1)
    column = mx.zeros((8,)).at[0].add(-1 / layer.scale)
    layer.lora_b = mx.concatenate([column[:, None], layer.lora_b[:, 1:]], axis=1)
    _, norm = project_with_norm(layer, x)
    parts = 2 * float(mx.square(row).sum())
    assert float(norm[0]) == pytest.approx(2**-10 * parts**0.5, rel=0.5)
    assert mx.isfinite(layer(x)).all()


def test_dropout_reaches_the_low_rank_branch_only():
    layer = dense(64, 48, dropout=0.5)
    x = mx.random.normal((2, 5, 64))
    mx.random.seed(3)
    layer(x)  # the untimed call of value_and_gradients draws the first mask
    mask = to_numpy(layer.dropout(mx.ones_like(x)))
    assert set(np.unique(mask)) == {0.0, 2.0}
    check(layer, x, mask=mask, dtype=mx.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_zero_rows_give_their_bias_and_no_nan(bias):
    layer = dense(64, 48, bias=bias)
    linear = layer.linear
    linear.weight = mx.where(mx.arange(48)[:, None] % 5 == 0, 0.0, linear.weight)
    layer.set_linear(linear)
    x = mx.random.normal((6, 64))
    untrained = DoRALinear.from_base(linear)
    expected = linear.bias[::5] if bias else mx.zeros(10)
    for call in (untrained, untrained.eval()):
        assert mx.array_equal(call(x)[:, ::5], mx.broadcast_to(expected, (6, 10)))
    zero = mx.where(mx.arange(48) % 5 == 0, 0.0, layer.lora_b)
    layer.lora_b = zero
    check(layer, x, dtype=mx.float32)
    assert not mx.isnan(layer.fuse().weight).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 96), (3, 5, 96), (64, 96)])
def test_untrained_layer_equals_its_base_bit_for_bit(shape, bias, dtype):
    linear = nn.Linear(96, 80, bias=bias)
    linear.set_dtype(dtype)
    layer = DoRALinear.from_base(linear)
    x = mx.random.normal(shape).astype(dtype)
    assert mx.array_equal(layer(x), linear(x))
    assert mx.array_equal(layer.eval()(x), linear(x))


@pytest.mark.parametrize(("mode", "bits", "group"), QUANTIZED_MODES)
def test_untrained_quantized_layer_equals_its_base_bit_for_bit(mode, bits, group):
    linear = quantized(nn.Linear(256, 96), group, bits, mode)
    layer = DoRALinear.from_base(linear)
    x = mx.random.normal((2, 9, 256))
    assert mx.array_equal(layer(x), linear(x))
    assert mx.array_equal(layer.eval()(x), linear(x))


def test_a_magnitude_of_one_per_mille_shows_in_bfloat16():
    mx.random.seed(0)
    linear = nn.Linear(1024, 1024, bias=False)
    linear.set_dtype(mx.bfloat16)
    layer = DoRALinear.from_base(linear, r=8, scale=1.0)
    layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.0035
    x = mx.random.normal((64, 1024)).astype(mx.bfloat16)
    low_rank = to_numpy((x.astype(mx.float32) @ layer.lora_a) @ layer.lora_b)
    share = np.sqrt(np.mean(low_rank**2)) / np.sqrt(np.mean(to_numpy(linear(x)) ** 2))
    assert 0.005 < share < 0.015
    for mode in (True, False):
        layer.train(mode)
        before = to_numpy(layer(x))
        layer.m = layer.m * 1.001
        after = to_numpy(layer(x))
        layer.m = layer.m / 1.001
        change = np.sum(after * before) / np.sum(before * before) - 1
        assert 0.0009 < change < 0.0011


def test_gradient_of_a_zero_magnitude_is_zero():
    layer = dense(32, 16)
    layer.m = mx.where(mx.arange(16) == 3, 0.0, layer.m)
    x = mx.random.normal((4, 32))
    _, gradients, _ = value_and_gradients(layer, x, np.ones((4, 16)))
    assert gradients["m"][3].item() == 0
    assert (gradients["m"] != 0).sum().item() == 15


@pytest.mark.parametrize(
    "wrap", [pytest.param("compile", marks=pytest.mark.compiled), "checkpoint"]
)
def test_gradients_survive_compile_and_checkpoint(wrap):
    layer = dense(48, 40, bias=True)
    x = mx.random.normal((5, 48))

    def loss(params, x):
        layer.update(params)
        return (layer(x) ** 2).sum()

    params = {k: layer[k] for k in ("lora_a", "lora_b", "m")}
    expected = mx.grad(loss)(params, x)
    if wrap == "compile":
        actual = mx.compile(mx.grad(loss))(params, x)
    else:
        actual = mx.grad(mx.checkpoint(loss))(params, x)
    for name, value in expected.items():
        assert relative_rms(actual[name], to_numpy(value)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_fuse_keeps_dtype_and_rounds_once(dtype):
    layer = dense(96, 80, bias=True, dtype=dtype)
    fused = layer.fuse()
    weight = dense_weight(layer.linear)
    adapted = weight + 2.0 * (to_numpy(layer.lora_a) @ to_numpy(layer.lora_b)).T
    norm = np.linalg.norm(adapted, axis=1, keepdims=True)
    expected = to_numpy(layer.m)[:, None] * adapted / norm
    assert type(fused) is nn.Linear
    assert fused.weight.dtype == dtype
    assert mx.array_equal(fused.bias, layer.linear.bias)
    rounded = to_numpy(mx.array(expected.astype(np.float32)).astype(dtype))
    # float32 arithmetic may differ only in the direction of a tie; TF32 shows in bits.
    if not IS_TF32:
        assert np.mean(to_numpy(fused.weight) != rounded) < (
            1 if dtype == mx.float32 else 0.01
        )
    assert_close(fused.weight, expected, dtype, 1e-6 if dtype == mx.float32 else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_untrained_layer_fuses_to_the_identical_weight(dtype):
    linear = nn.Linear(96, 80)
    linear.set_dtype(dtype)
    assert mx.array_equal(DoRALinear.from_base(linear).fuse().weight, linear.weight)


@pytest.mark.parametrize(("mode", "bits", "group"), QUANTIZED_MODES)
def test_quantized_fuse(mode, bits, group):
    linear = quantized(nn.Linear(256, 96), group, bits, mode)
    layer = DoRALinear.from_base(linear, scale=2.0)
    same: Any = layer.fuse()
    assert mx.array_equal(same.weight, linear.weight)
    assert mx.array_equal(same.scales, linear.scales)
    x = mx.random.normal((3, 256))
    assert mx.array_equal(same(x), linear(x))
    trained(layer)
    plain = layer.fuse(dequantize=True)
    assert type(plain) is nn.Linear
    bound = 1e-5 if mode == "affine" else 8e-3  # the others unpack to bfloat16
    assert_close(plain(x), to_numpy(layer(x)), bound=bound)
    packed: Any = layer.fuse()
    assert type(packed) is nn.QuantizedLinear
    assert packed.scales.dtype == linear.scales.dtype


def test_a_layer_from_parts_is_the_layer_they_were_taken_from():
    layer = dense(64, 48, bias=True)
    again = DoRALinear.from_parts(layer.linear, layer.adapted())
    x = mx.random.normal((6, 64))
    for mode in (True, False):
        assert mx.array_equal(again.train(mode)(x), layer.train(mode)(x))
    assert again.linear is layer.linear


def test_parts_without_magnitudes_keep_the_lengths_of_the_base():
    layer = dense(64, 48)
    update = layer.adapted().update
    again = DoRALinear.from_parts(layer.linear, Adapted(update=update, m=None))
    assert_close(again.m, np.linalg.norm(dense_weight(layer.linear), axis=1))


def test_parts_that_do_not_fit_the_base_are_refused():
    adapted = dense(32, 48).adapted()
    with pytest.raises(DoRAError, match="do not fit a weight"):
        DoRALinear.from_parts(nn.Linear(64, 48), adapted)
