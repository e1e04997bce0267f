"""Compares `DoRASwitchLinear` with float64, expert by expert."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_dora import DoRAError, DoRASwitchLinear
from mlx_dora.layers import dora_class
from tests.checks import BOUNDS, assert_close, to_numpy
from tests.layers.oracle import dense_weight, dora_truth

EXPERTS, OUT, WIDTH, RANK = 5, 48, 64, 3


def make_base(bits: int | None, bias: bool, dtype: mx.Dtype = mx.float32) -> Any:
    mx.random.seed(0)
    base = SwitchLinear(WIDTH, OUT, EXPERTS, bias=bias)
    base.weight = mx.random.normal(base.weight.shape) / WIDTH**0.5
    if bias:
        base.bias = mx.random.normal((EXPERTS, OUT))
    base.set_dtype(dtype)
    return base if bits is None else base.to_quantized(32, bits)


def trained(layer: Any) -> Any:
    layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape) / layer.scale
    layer.m = layer.m * (1 + 0.2 * mx.random.normal(layer.m.shape))
    layer.unfreeze()
    layer.linear.freeze()
    return layer


def inputs(is_sorted: bool) -> tuple[mx.array, mx.array]:
    """Return inputs like those of mlx-lm's `SwitchGLU`; expert 4 is never chosen."""
    mx.random.seed(1)
    if is_sorted:
        indices = mx.sort(mx.random.randint(0, EXPERTS - 1, (40,)))
        return mx.random.normal((40, 1, WIDTH)), indices
    indices = mx.random.randint(0, EXPERTS - 1, (2, 7, 3))
    return mx.random.normal((2, 7, 1, 1, WIDTH)), indices


@pytest.mark.parametrize("is_sorted", [False, True], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_forward_and_gradients(bits: int | None, bias: bool, is_sorted: bool) -> None:
    base = make_base(bits, bias)
    layer = trained(DoRASwitchLinear.from_base(base, r=RANK, scale=2.0))
    x, indices = inputs(is_sorted)
    weights = dense_weight(base)
    out = layer(x, indices, sorted_indices=is_sorted)
    cotangent = mx.random.normal(out.shape)

    def pulled(x: mx.array, parameters: dict[str, mx.array]) -> mx.array:
        layer.update(parameters)
        return (layer(x, indices, sorted_indices=is_sorted) * cotangent).sum()

    names = ("lora_a", "lora_b", "m")
    dx, grads = mx.grad(pulled, argnums=(0, 1))(x, {n: layer[n] for n in names})

    flat = np.array(indices).reshape(-1)
    rows = to_numpy(mx.broadcast_to(x, (*indices.shape, 1, WIDTH))).reshape(-1, WIDTH)
    output, pull = (to_numpy(v).reshape(-1, OUT) for v in (out, cotangent))
    expected_dx = np.zeros_like(rows)
    for expert in range(EXPERTS):
        chosen = flat == expert
        truth = dora_truth(
            rows[chosen],
            weights[expert],
            to_numpy(layer.lora_a[expert]).T,
            to_numpy(layer.lora_b[expert]).T,
            2.0,
            to_numpy(layer.m[expert]),
            pull[chosen],
            to_numpy(base.bias[expert]) if bias else None,
        )
        expected_dx[chosen] = truth.x
        if not chosen.any():
            assert expert == EXPERTS - 1
            assert all(mx.all(grads[name][expert] == 0) for name in names)
            continue
        assert_close(output[chosen], truth.out)
        assert_close(grads["lora_a"][expert], truth.lora_a.T)
        assert_close(grads["lora_b"][expert], truth.lora_b.T)
        assert_close(grads["m"][expert], truth.m)
    if not is_sorted:  # a token's experts share its input
        expected_dx = expected_dx.reshape(*indices.shape, WIDTH).sum(axis=2)
    assert_close(to_numpy(dx).reshape(expected_dx.shape), expected_dx)


# On the CPU, MLX runs dense experts only in float32.
@pytest.mark.parametrize(
    ("bits", "dtype"), [(None, mx.float32), *((4, dtype) for dtype in BOUNDS)]
)
def test_starts_as_the_base_to_the_bit(bits: int | None, dtype: mx.Dtype) -> None:
    base = make_base(bits, bias=True, dtype=dtype)
    layer = DoRASwitchLinear.from_base(base, r=RANK)
    x, indices = inputs(is_sorted=False)
    x = x.astype(dtype)
    for mode in (True, False):
        layer.train(mode)
        assert mx.array_equal(layer(x, indices), base(x, indices))
    layer.m = layer.m * 2
    assert not mx.array_equal(layer(x, indices), base(x, indices))
    layer.enabled = False
    assert mx.array_equal(layer(x, indices), base(x, indices))


def test_zero_rows_stay_zero() -> None:
    base = make_base(None, bias=False)
    base.weight[1, 3] = 0
    layer = DoRASwitchLinear.from_base(base, r=RANK)
    x, indices = inputs(is_sorted=False)
    out = layer(x, indices)
    assert mx.all(mx.isfinite(out))
    assert mx.array_equal(out, base(x, indices))


def test_eval_mode_sees_changes() -> None:
    layer = trained(DoRASwitchLinear.from_base(make_base(None, False), r=RANK))
    x, indices = inputs(is_sorted=False)
    layer.eval()
    before = layer(x, indices)
    assert layer._cache is not None
    layer.update({"m": layer.m * 2})
    assert_close(layer(x, indices), 2 * to_numpy(before))


@pytest.mark.parametrize("bits", [None, 4])
def test_fuse_says_the_same(bits: int | None) -> None:
    base = make_base(bits, bias=True)
    layer = trained(DoRASwitchLinear.from_base(base, r=RANK, scale=2.0))
    x, indices = inputs(is_sorted=False)
    dense = layer.fuse(dequantize=True)
    assert type(dense) is SwitchLinear
    assert_close(dense(x, indices), to_numpy(layer(x, indices)))
    if bits is not None:
        packed = layer.fuse()
        assert type(packed) is type(layer.linear)
        untrained: Any = DoRASwitchLinear.from_base(layer.linear, r=RANK).fuse()
        assert mx.array_equal(untrained.weight, base.weight)
        assert mx.array_equal(untrained.scales, base.scales)


@pytest.mark.parametrize("bits", [None, 4])
def test_no_array_as_large_as_the_experts(bits: int | None) -> None:
    mx.random.seed(0)
    base: Any = SwitchLinear(512, 512, 16, bias=False)
    if bits is not None:
        base = base.to_quantized(64, bits)
    mx.eval(base.parameters())
    layer = trained(DoRASwitchLinear.from_base(base, r=4))
    mx.eval(layer.parameters())
    x, indices = mx.random.normal((2, 1, 1, 512)), mx.zeros((2, 1), mx.int32)

    def loss(layer: nn.Module, x: mx.array) -> mx.array:
        return layer(x, indices).square().sum()

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(layer, loss)(layer, x))
    stack = 16 * 512 * 512 * 4
    assert mx.get_peak_memory() - before < stack / 4


def test_chosen_by_exact_class() -> None:
    base = make_base(None, False)
    assert dora_class(base) is DoRASwitchLinear

    class Other(SwitchLinear):
        pass

    with pytest.raises(DoRAError, match="Other cannot take DoRA"):
        DoRASwitchLinear.from_base(Other(4, 4, 2))


def test_a_global_scale_is_refused() -> None:
    base = make_base(4, False)
    base.global_scale = mx.ones(EXPERTS)
    with pytest.raises(
        DoRAError, match="QuantizedSwitchLinear has weights with a glob"
    ):
        DoRASwitchLinear.from_base(base)
