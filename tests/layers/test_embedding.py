import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.layers import DoRAEmbedding, held_norms
from tests.checks import BOUNDS, assert_close, to_numpy
from tests.layers.oracle import (
    QUANTIZED_MODES,
    dense_weight,
    dora_truth,
    trained,
    value_and_gradients,
)

TOKENS = mx.array([[3, 5, 3, 0], [31, 40, 7, 3]])


def adapted_rows(layer):
    weight = dense_weight(layer.embedding)
    update = to_numpy(layer.lora_a) @ to_numpy(layer.lora_b)
    adapted = weight + layer.scale * update
    norm = np.linalg.norm(adapted, axis=1)
    return adapted, norm


def make(dtype=mx.float32, vocabulary=41, dims=64, quantize=None):
    mx.random.seed(0)
    embedding = nn.Embedding(vocabulary, dims)
    embedding.set_dtype(dtype)
    if quantize:
        mode, bits, group = quantize
        embedding = nn.QuantizedEmbedding.from_embedding(embedding, group, bits, mode)
    return trained(DoRAEmbedding.from_base(embedding, r=4, scale=2.0))


def check_lookup(layer, dtype):
    rng = np.random.default_rng(2)
    dims = layer.lora_b.shape[1]
    cotangent = rng.standard_normal((*TOKENS.shape, dims)).astype(np.float32)
    adapted, norm = adapted_rows(layer)
    ids = np.array(TOKENS)
    gain = np.divide(to_numpy(layer.m), norm, out=np.zeros_like(norm), where=norm > 0)
    unit = adapted / np.where(norm > 0, norm, np.inf)[:, None]
    expected = {name: np.zeros(layer[name].shape) for name in ("lora_a", "lora_b", "m")}
    for token, dy in zip(ids.ravel(), cotangent.reshape(-1, dims), strict=True):
        scaled = layer.scale * gain[token] * dy
        expected["lora_a"][token] += to_numpy(layer.lora_b) @ scaled
        expected["lora_b"] += np.outer(to_numpy(layer.lora_a)[token], scaled)
        expected["m"][token] += dy @ unit[token]
    out, gradients, _ = value_and_gradients(layer, TOKENS, cotangent)
    assert out.dtype == dtype
    assert_close(out, (gain[:, None] * adapted)[ids], dtype)
    for name, value in expected.items():
        assert_close(gradients[name], value, dtype)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_lookup_and_gradients_match_float64(dtype):
    check_lookup(make(dtype), dtype)


@pytest.mark.parametrize("quantize", QUANTIZED_MODES)
def test_quantized_lookup_and_gradients_match_float64(quantize):
    layer = make(dims=128, quantize=quantize)
    dtype = layer.embedding(TOKENS).dtype
    check_lookup(layer, dtype)


def check_projection(layer, dtype):
    rng = np.random.default_rng(2)
    x = mx.array(rng.standard_normal((3, layer.lora_b.shape[1]))).astype(dtype)
    cotangent = rng.standard_normal((3, layer.m.size)).astype(np.float32)
    truth = dora_truth(
        to_numpy(x),
        dense_weight(layer.embedding),
        to_numpy(layer.lora_b).T,
        to_numpy(layer.lora_a).T,
        layer.scale,
        to_numpy(layer.m),
        cotangent.astype(np.float64),
    )
    out, gradients, dx = value_and_gradients(layer, x, cotangent, layer.as_linear)
    assert out.dtype == dtype
    assert_close(out, truth.out, dtype)
    assert_close(gradients["lora_a"], truth.lora_b.T, dtype)
    assert_close(gradients["lora_b"], truth.lora_a.T, dtype)
    assert_close(gradients["m"], truth.m, dtype)
    assert_close(dx, truth.x, dtype)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_tied_head_and_gradients_match_float64(dtype):
    check_projection(make(dtype), dtype)


@pytest.mark.parametrize("quantize", QUANTIZED_MODES)
def test_quantized_tied_head_matches_float64(quantize):
    check_projection(make(dims=128, quantize=quantize), mx.float32)


@pytest.mark.parametrize("quantize", [None, *QUANTIZED_MODES])
def test_untrained_embedding_equals_its_base_bit_for_bit(quantize):
    embedding = nn.Embedding(41, 128)
    if quantize:
        mode, bits, group = quantize
        embedding = nn.QuantizedEmbedding.from_embedding(embedding, group, bits, mode)
    layer = DoRAEmbedding.from_base(embedding)
    x = mx.random.normal((5, 128))
    for mode in (True, False):
        layer.train(mode)
        assert mx.array_equal(layer(TOKENS), embedding(TOKENS))
        assert mx.array_equal(layer.as_linear(x), embedding.as_linear(x))
        assert mx.array_equal(layer.as_linear(x[0]), embedding.as_linear(x[0]))
    assert mx.array_equal(layer.fuse().weight, embedding.weight)


def test_zero_rows_of_an_embedding_stay_zero():
    embedding = nn.Embedding(41, 64)
    embedding.weight = mx.where(mx.arange(41)[:, None] == 3, 0.0, embedding.weight)
    layer = DoRAEmbedding.from_base(embedding, r=4, scale=2.0)
    trained(layer)
    layer.lora_a = mx.where(mx.arange(41)[:, None] == 3, 0.0, layer.lora_a)
    check_lookup(layer, mx.float32)
    check_projection(layer, mx.float32)
    assert (layer(mx.array([3])) == 0).all()
    assert not mx.isnan(layer.fuse().weight).any()


def test_half_precision_magnitudes_do_not_overflow():
    embedding = nn.Embedding(8, 64)
    embedding.weight = (embedding.weight * 4000).astype(mx.float16)
    layer = DoRAEmbedding.from_base(embedding)
    assert layer.m.dtype == mx.float32
    assert mx.isfinite(layer.m).all()
    assert mx.array_equal(layer.fuse().weight, embedding.weight)


def test_eval_mode_and_held_norms_agree_with_training():
    layer = make()
    x = mx.random.normal((5, 64))
    expected = to_numpy(layer.as_linear(x)), to_numpy(layer(TOKENS))
    with held_norms(layer):
        assert_close(layer.as_linear(x), expected[0], bound=1e-6)
        assert_close(layer(TOKENS), expected[1], bound=1e-6)
    layer.eval()
    assert_close(layer.as_linear(x), expected[0], bound=1e-6)
    assert_close(layer(TOKENS), expected[1], bound=1e-6)


def test_fused_embedding_keeps_dtype_and_agrees():
    layer = make(mx.bfloat16)
    fused = layer.fuse()
    assert fused.weight.dtype == mx.bfloat16
    assert_close(fused(TOKENS), to_numpy(layer(TOKENS)), mx.bfloat16)
