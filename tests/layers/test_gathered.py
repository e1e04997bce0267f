"""Gathered layers against Eq. 5 of DoRA in float64 NumPy, row by row."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRAEmbedding, DoRALayer, DoRALinear
from mlx_dora.layers.gathered import BASE, BatchRows, gathered_layer
from tests.checks import assert_close, to_numpy
from tests.layers.oracle import dense_weight, quantized

WIDTH, OUT = 64, 96
RANKS = (1, 4, 16, 0)  # 0: an adapter that leaves this layer alone


def linear(bits: int | None, bias: bool, dtype: mx.Dtype) -> Any:
    mx.random.seed(0)
    layer = nn.Linear(WIDTH, OUT, bias=bias)
    layer.set_dtype(dtype)
    return layer if bits is None else quantized(layer, 32, bits)


def adapted(base: nn.Module, kind: type[DoRALayer], rank: int, seed: int) -> DoRALayer:
    """An adapter as if trained; with an odd seed a LoRA: magnitudes equal norms."""
    mx.random.seed(seed)
    layer = kind.from_base(base, r=rank, scale=1.5)
    layer.lora_a = mx.random.normal(layer.lora_a.shape) * 0.2
    layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.2
    layer.m = layer.norm()
    if seed % 2 == 0:
        layer.m = layer.m * (1 + 0.3 * mx.random.normal(layer.m.shape))
    layer.eval()
    mx.eval(layer.parameters())
    return layer


def dense(layer: DoRALayer) -> np.ndarray:
    """Return W' in float64."""
    a, b = (to_numpy(factor) for factor in layer.factors())
    rows = dense_weight(layer.base) + layer.scale * (a @ b).T
    return to_numpy(layer.m)[:, None] * rows / np.linalg.norm(rows, axis=1)[:, None]


def make(
    base: nn.Module, kind: type[DoRALayer]
) -> tuple[Any, BatchRows, dict[int, DoRALayer]]:
    rows = BatchRows()
    layer = gathered_layer(base, rows, "here")
    layers = {
        key: adapted(base, kind, rank, key)
        for key, rank in enumerate(RANKS, start=1)
        if rank
    }
    for key, one in layers.items():
        layer.put(key, one)
    return layer, rows, layers


BATCHES = [[1, 2, 3, 4, BASE], [3, BASE, 3, 1, 3], [2, 2, 2], [4, BASE], [BASE]]


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("keys", BATCHES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_each_row_has_its_own_adapter(
    bits: int | None, bias: bool, keys: list[int], length: int
) -> None:
    base = linear(bits, bias, mx.float32)
    layer, rows, layers = make(base, DoRALinear)
    x = mx.random.normal((len(keys), length, WIDTH))
    rows.use(keys)
    actual = layer(x)
    assert actual.shape == (len(keys), length, OUT)
    for row, key in enumerate(keys):
        weight = dense(layers[key]) if key in layers else dense_weight(base)
        expected = to_numpy(x[row]) @ weight.T
        if bias:
            expected = expected + to_numpy(base.bias)
        assert_close(actual[row], expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("length", [1, 3])
def test_half_precision_is_rounded_once(dtype: mx.Dtype, length: int) -> None:
    base = linear(None, True, dtype)
    layer, rows, layers = make(base, DoRALinear)
    keys = [1, 2, BASE, 3]
    x = mx.random.normal((4, length, WIDTH)).astype(dtype)
    rows.use(keys)
    actual = layer(x)
    assert actual.dtype == dtype
    for row, key in enumerate(keys):
        alone = layers[key](x[row]) if key in layers else base(x[row])
        assert_close(actual[row], to_numpy(alone), dtype)


@pytest.mark.compiled
def test_batches_of_several_sizes_share_compiled_code() -> None:
    base = linear(None, True, mx.bfloat16)
    layer, rows, layers = make(base, DoRALinear)
    for keys in ([1, 2], [1], [3, BASE, 2, 1], [2, 3, 2]):
        x = mx.random.normal((len(keys), 1, WIDTH)).astype(mx.bfloat16)
        rows.use(keys)
        actual = layer(x)
        for row, key in enumerate(keys):
            alone = layers[key](x[row]) if key in layers else base(x[row])
            assert_close(actual[row], to_numpy(alone), mx.bfloat16)


def test_a_row_of_the_base_is_not_changed_by_others() -> None:
    base = linear(None, True, mx.float32)
    layer, rows, _ = make(base, DoRALinear)
    x = mx.random.normal((3, 1, WIDTH))
    rows.use([BASE, 1, 3])
    together = layer(x)
    assert mx.array_equal(together[0], base(x.reshape(3, WIDTH))[:1])


def test_an_overflow_of_an_adapter_stays_in_its_rows() -> None:
    base = linear(None, False, mx.float16)
    layer, rows, layers = make(base, DoRALinear)
    layers[1].lora_a = layers[1].lora_a * 1e4
    x = mx.full((2, 1, WIDTH), 100.0).astype(mx.float16)
    rows.use([1, 2])
    together = layer(x)
    assert not mx.isfinite(together[0]).all()
    assert mx.isfinite(together[1]).all()


@pytest.mark.parametrize("length", [1, 4])
def test_embeddings_and_tied_heads(length: int) -> None:
    mx.random.seed(0)
    base = nn.Embedding(50, WIDTH)
    layer, rows, layers = make(base, DoRAEmbedding)
    keys = [3, 1, BASE, 2, 4]
    rows.use(keys)
    tokens = mx.random.randint(0, 50, (5, length))
    x = mx.random.normal((5, length, WIDTH))
    looked_up, projected = layer(tokens), layer.as_linear(x)
    for row, key in enumerate(keys):
        weight = dense(layers[key]) if key in layers else to_numpy(base.weight)
        assert_close(looked_up[row], weight[np.array(tokens[row])])
        assert_close(projected[row], to_numpy(x[row]) @ weight.T)


def test_flattened_rows_are_told_apart() -> None:
    base = linear(None, False, mx.float32)
    layer, rows, _ = make(base, DoRALinear)
    x = mx.random.normal((2, 3, WIDTH))
    rows.use([1, 2])
    assert_close(layer(x.reshape(6, WIDTH)), to_numpy(layer(x)).reshape(6, OUT))
    with pytest.raises(DoRAError, match="here: the model calls it with 5 tokens"):
        layer(x.reshape(6, WIDTH)[:5])


def test_a_removed_adapter_leaves_the_base() -> None:
    base = linear(None, False, mx.float32)
    layer, rows, _ = make(base, DoRALinear)
    x = mx.random.normal((2, 1, WIDTH))
    rows.use([1, 2])
    before = layer(x)
    layer.drop(1)
    rows.forget()
    rows.use([1, 2])
    after = layer(x)
    assert mx.array_equal(after[0], base(x.reshape(2, WIDTH))[:1])
    assert_close(after[1], to_numpy(before[1]))


def test_a_layer_that_only_others_adapt_gives_the_base() -> None:
    base = linear(None, False, mx.float32)
    layer, rows, _ = make(base, DoRALinear)
    x = mx.random.normal((3, 1, WIDTH))
    rows.use([1, 4, BASE])  # 4 leaves this layer alone
    layer(x)
    rows.use([4, BASE, 4])  # the factors of 1 and 4 are joined already
    assert mx.array_equal(layer(x).reshape(3, OUT), base(x.reshape(3, WIDTH)))


def test_reading_the_weight_is_refused() -> None:
    layer, _, _ = make(linear(None, False, mx.float32), DoRALinear)
    assert not hasattr(layer, "weight")
    with pytest.raises(DoRAError, match="here: the model's own code reads its weight"):
        _ = layer.weight
