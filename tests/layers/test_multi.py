"""Compares `DoRAMultiLinear` with float64, for each head and both products."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.mla import MultiLinear

from mlx_dora import DoRAError, DoRAMultiLinear
from mlx_dora.layers import dora_class
from tests.checks import BOUNDS, assert_close, to_numpy
from tests.layers.oracle import QUANTIZED_MODES, dense_weight, dora_truth

HEADS, OUT, WIDTH, RANK, SCALE = 3, 128, 64, 4, 2.0
FORMS = [None, *(mode for mode in QUANTIZED_MODES if mode[2] <= 32)]
SIDES = pytest.mark.parametrize("transpose", [True, False], ids=["right", "left"])


def make_base(form: Any = None, dtype: mx.Dtype = mx.float32) -> Any:
    mx.random.seed(0)
    base = MultiLinear(WIDTH, OUT, HEADS)
    base.weight = mx.random.normal(base.weight.shape) / WIDTH**0.5
    base.set_dtype(dtype)
    if form is None:
        return base
    mode, bits, group = form
    return base.to_quantized(group, bits, mode)


def trained(layer: Any) -> Any:
    layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape) / layer.scale
    layer.m = layer.m * (1 + 0.2 * mx.random.normal(layer.m.shape))
    layer.unfreeze()
    layer.linear.freeze()
    return layer


def left_truth(
    x: np.ndarray, weight: np.ndarray, layer: Any, head: int, pull: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Return x W' of one head with a constant norm, and its gradients."""
    a, b = (to_numpy(factor[head]) for factor in layer.factors())
    m = to_numpy(layer.m[head])
    rows = weight + SCALE * (a @ b).T
    norm = np.linalg.norm(rows, axis=1)
    gain = m / norm
    adapted = gain[:, None] * rows
    d_weight = x.T @ pull  # of W', (out, in)
    d_rows = SCALE * gain[:, None] * d_weight
    gradients = {
        "m": (d_weight * rows).sum(1) / norm,
        "lora_a": (d_rows.T @ b.T).T,
        "lora_b": (a.T @ d_rows.T).T,
    }
    return x @ adapted, gradients, pull @ adapted.T


@SIDES
@pytest.mark.parametrize("shared", [False, True], ids=["a head", "shared"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_and_gradients(form: Any, shared: bool, transpose: bool) -> None:
    base = make_base(form)
    layer = trained(DoRAMultiLinear.from_base(base, r=RANK, scale=SCALE))
    mx.random.seed(1)
    wide = WIDTH if transpose else OUT
    x = mx.random.normal((2, 1 if shared else HEADS, 5, wide))
    weights = dense_weight(base)
    out = layer(x, transpose=transpose)
    pull = mx.random.normal(out.shape)

    def pulled(x: mx.array, parameters: dict[str, mx.array]) -> mx.array:
        layer.update(parameters)
        return (layer(x, transpose=transpose) * pull).sum()

    names = ("lora_a", "lora_b", "m")
    dx, grads = mx.grad(pulled, argnums=(0, 1))(x, {n: layer[n] for n in names})
    rows, cotangent = to_numpy(x), to_numpy(pull)
    expected_dx = np.zeros(rows.shape)
    for head in range(HEADS):
        row = 0 if shared else head
        inputs = rows[:, row].reshape(-1, wide)
        dy = cotangent[:, head].reshape(len(inputs), -1)
        if transpose:
            a, b = (to_numpy(v[head]) for v in layer.factors())
            m = to_numpy(layer.m[head])
            truth = dora_truth(inputs, weights[head], a, b, SCALE, m, dy)
            value, back = truth.out, truth.x
            wanted = {
                "m": truth.m,
                "lora_a": truth.lora_a.T,
                "lora_b": truth.lora_b.T,
            }
        else:
            value, wanted, back = left_truth(inputs, weights[head], layer, head, dy)
        assert_close(to_numpy(out[:, head]).reshape(value.shape), value)
        for name in names:
            assert_close(grads[name][head], wanted[name])
        expected_dx[:, row] += back.reshape(2, 5, wide)
    assert_close(dx, expected_dx)


@SIDES
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_starts_as_the_base_to_the_bit(
    dtype: mx.Dtype, bits: int | None, transpose: bool
) -> None:
    base = make_base(bits and ("affine", bits, 32), dtype)
    layer = DoRAMultiLinear.from_base(base, r=RANK)
    x = mx.random.normal((1, HEADS, 3, WIDTH if transpose else OUT)).astype(dtype)
    expected = base(x, transpose=transpose)
    for mode in (True, False):
        layer.train(mode)
        actual = layer(x, transpose=transpose)
        assert actual.dtype == expected.dtype
        assert mx.array_equal(actual, expected)
    layer.m = layer.m * 2
    assert not mx.array_equal(layer(x, transpose=transpose), expected)
    layer.enabled = False
    assert mx.array_equal(layer(x, transpose=transpose), expected)


@SIDES
def test_a_small_magnitude_is_seen_in_half_precision(transpose: bool) -> None:
    """A change of a thousandth, which rounding g or x∘g to bfloat16 would lose."""
    layer = DoRAMultiLinear.from_base(make_base(dtype=mx.bfloat16), r=RANK, scale=1.0)
    layer.lora_b = 0.02 * mx.random.normal(layer.lora_b.shape)
    wide = WIDTH if transpose else OUT
    x = mx.random.normal((1, HEADS, 400, wide)).astype(mx.bfloat16)
    before = to_numpy(layer(x, transpose=transpose))
    layer.m = layer.m * 1.001
    after = to_numpy(layer(x, transpose=transpose))
    grown = (after * before).sum() / (before * before).sum() - 1
    assert grown == pytest.approx(1e-3, rel=0.25)


@SIDES
@pytest.mark.parametrize("form", [None, ("affine", 4, 32), ("mxfp4", 4, 32)], ids=str)
def test_fuse_says_the_same(form: Any, transpose: bool) -> None:
    base = make_base(form)
    layer = trained(DoRAMultiLinear.from_base(base, r=RANK, scale=SCALE))
    x = mx.random.normal((1, HEADS, 3, WIDTH if transpose else OUT))
    dense: Any = layer.fuse(dequantize=True)
    assert type(dense) is MultiLinear
    bound = 1e-5 if form is None or form[0] == "affine" else 4e-3  # bfloat16 weights
    expected = to_numpy(layer(x, transpose=transpose))
    assert_close(dense(x, transpose=transpose), expected, bound=bound)
    if form is not None:
        assert type(layer.fuse()) is type(base)
        untrained: Any = DoRAMultiLinear.from_base(base, r=RANK).fuse()
        assert mx.array_equal(untrained.weight, base.weight)
        assert mx.array_equal(untrained.scales, base.scales)
        untrained(x, transpose=transpose)


def test_eval_mode_takes_rows_that_cancel_densely() -> None:
    """Training floors such a norm; inference must not."""
    base = make_base()
    layer = DoRAMultiLinear.from_base(base, r=RANK, scale=1.0)
    gone = 0.999 * base.weight[1, 3]
    layer.lora_a[1, 0] = gone
    layer.lora_b[1, 3, 0] = -1.0
    layer.m = layer.m * 1.0
    layer.eval()
    gain = to_numpy(layer.gain())[1, 3]
    rest = to_numpy(base.weight)[1, 3] - to_numpy(gone)
    expected = to_numpy(layer.m)[1, 3] / np.linalg.norm(rest)
    assert gain == pytest.approx(expected, rel=1e-3)  # the rest in float32 is noisy


def test_a_zero_row_stays_zero() -> None:
    base = make_base()
    base.weight[1, 3] = 0
    layer = DoRAMultiLinear.from_base(base, r=RANK)
    for transpose, wide in ((True, WIDTH), (False, OUT)):
        x = mx.random.normal((1, HEADS, 2, wide))
        assert_close(layer(x, transpose), to_numpy(base(x, transpose)))


@pytest.mark.compiled
def test_works_compiled_in_eval_mode() -> None:
    layer = trained(DoRAMultiLinear.from_base(make_base(), r=RANK)).eval()
    x = mx.random.normal((1, HEADS, 2, WIDTH))
    call = mx.compile(layer, inputs=layer.state)
    assert_close(call(x), to_numpy(layer(x)))
    layer.m = layer.m * 2
    assert_close(call(x), to_numpy(layer(x)))


@SIDES
@pytest.mark.parametrize("bits", [None, 4])
def test_no_array_as_large_as_the_heads(bits: int | None, transpose: bool) -> None:
    mx.random.seed(0)
    base: Any = MultiLinear(512, 512, 16)
    base.set_dtype(mx.bfloat16)
    if bits is not None:
        base = base.to_quantized(64, bits)
    mx.eval(base.parameters())
    layer = trained(DoRAMultiLinear.from_base(base, r=4))
    mx.eval(layer.parameters())
    x = mx.random.normal((1, 1, 1, 512)).astype(mx.bfloat16)

    def loss(layer: nn.Module, x: mx.array) -> mx.array:
        return layer(x, transpose=transpose).square().sum()

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(layer, loss)(layer, x))
    stack = 16 * 512 * 512 * 4
    assert mx.get_peak_memory() - before < stack / 4


def test_chosen_by_exact_class() -> None:
    assert dora_class(make_base()) is DoRAMultiLinear

    class Other(MultiLinear):
        pass

    with pytest.raises(DoRAError, match="Other cannot take DoRA"):
        DoRAMultiLinear.from_base(Other(4, 4, 2))
