"""Gated delta nets: MLX's operation against float64 and against mlx-lm's operations."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gated_delta

from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.evaluate.loss import loss_fn
from mlx_dora.train import gated_delta as ours
from mlx_dora.train.gated_delta import DeltaShape, fused_delta, shapes_in
from mlx_dora.train.metal import kernel_names
from tests.checks import assert_close
from tests.compat.tiny_models import build
from tests.compat.tiny_sizes import VOCABULARY

SHAPE = DeltaShape(key_heads=2, key_width=5, value_heads=4, value_width=3)


def recurrence(inputs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and last state in float64, from the definition."""
    q, k, v, g, beta, state = inputs
    state = state.copy()
    repeats = v.shape[2] // k.shape[2]
    q, k = (np.repeat(a, repeats, axis=2) for a in (q, k))
    y = np.zeros(v.shape)
    for batch, t, head in np.ndindex(v.shape[:3]):
        here = batch, t, head
        s = g[here] * state[batch, head]
        s = s + np.outer(beta[here] * (v[here] - s @ k[here]), k[here])
        state[batch, head] = s
        y[here] = s @ q[here]
    return y, state


def total(inputs: list[np.ndarray]) -> float:
    y, state = recurrence(inputs)
    weights = np.cos(np.arange(y.size)).reshape(y.shape)
    return float((weights * y).sum() + np.sin(state).sum())


def numbers(seed: int = 0, batch: int = 2, tokens: int = 6) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    keyed = (batch, tokens, SHAPE.key_heads, SHAPE.key_width)
    valued = (batch, tokens, SHAPE.value_heads, SHAPE.value_width)
    state = (batch, SHAPE.value_heads, SHAPE.value_width, SHAPE.key_width)
    return [
        *(random.normal(size=s) for s in (keyed, keyed, valued)),
        random.uniform(0.5, 1, size=valued[:3]),
        random.uniform(0, 1, size=valued[:3]),
        random.normal(size=state),
    ]


def test_values_and_gradients_are_those_of_the_recurrence() -> None:
    inputs = numbers()
    arrays = [mx.array(a.astype(np.float32)) for a in inputs]
    found = ours._with_gradients(ours._fused, arrays)
    for array, expected in zip(found, recurrence(inputs), strict=False):
        assert_close(array, expected, bound=1e-5)
    for place, gradient in enumerate(found[2:]):
        expected = np.zeros(inputs[place].shape)
        for index in np.ndindex(expected.shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in inputs]
                moved[place][index] += step
                sides.append(total(moved))
            expected[index] = (sides[0] - sides[1]) / 2e-6
        assert_close(gradient, expected, bound=1e-5)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the keys in calls of MLX's operation."""
    calls: list[tuple[int, ...]] = []
    plain = mx.fast.gated_delta_update

    def update(q: mx.array, k: mx.array, *args: Any, **settings: Any) -> Any:
        calls.append(k.shape)
        return plain(q, k, *args, **settings)

    monkeypatch.setattr(mx.fast, "gated_delta_update", update)
    return calls


def gradients(model: nn.Module) -> dict[str, mx.array]:
    tokens = mx.array([[(5 * i + j) % VOCABULARY for j in range(9)] for i in (0, 1)])
    marks = mx.array([[1, 9], [3, 9]])
    (_, _), found = nn.value_and_grad(model, loss_fn)(model, tokens, marks)
    return dict(tree_flatten(found))


def shape_of(model: nn.Module) -> frozenset[DeltaShape]:
    """Shapes of the model's calls, read from the calls."""
    shapes = set()
    plain = gated_delta.gated_delta_ops

    def note(q: mx.array, k: mx.array, v: mx.array, g: mx.array, *rest: Any) -> Any:
        shapes.add(
            DeltaShape(
                key_heads=k.shape[2],
                key_width=k.shape[3],
                value_heads=v.shape[2],
                value_width=v.shape[3],
            )
        )
        return plain(q, k, v, g, *rest)

    gated_delta.gated_delta_ops = note
    try:
        gradients(model)
    finally:
        gated_delta.gated_delta_ops = plain
    return frozenset(shapes)


@pytest.mark.parametrize(
    ("name", "is_served"),
    [
        ("qwen3_5", True),
        ("qwen3_next", True),
        ("olmo_hybrid", True),
        ("kimi_linear", False),  # a decay for each number of a key
        ("bailing_moe_v3", False),
    ],
)
def test_models_train_through_it(
    name: str, is_served: bool, counted: list[tuple[int, ...]]
) -> None:
    model: Any = build(name)
    apply_dora(model, DoRAConfig(rank=2, scale=2.0, num_layers=-1))
    model.train()
    shapes = shape_of(model)
    assert shapes
    expected = gradients(model)
    assert not counted
    with fused_delta(shapes):
        found = gradients(model)
        assert bool(counted) == is_served
    for number, (path, value) in enumerate(found.items()):
        assert_close(value, np.array(expected[path]), bound=1e-4)
        assert number or value.size
    before = len(counted)
    gradients(model)
    assert len(counted) == before  # mlx-lm's operations are back


def test_other_shapes_and_masks_stay_with_mlx_lm(
    counted: list[tuple[int, ...]],
) -> None:
    arrays = [mx.array(a.astype(np.float32)) for a in numbers()]
    with fused_delta(frozenset({SHAPE})):
        gated_delta.gated_delta_ops(*arrays)
        checked = len(counted)
        assert checked == 3  # the check, its gradient and the call
        gated_delta.gated_delta_ops(*arrays)
        assert len(counted) == checked + 1
        step: Any = gated_delta.gated_delta_ops
        step(*arrays, mx.ones((2, 6), mx.bool_))
        other = [a[:, :, :1] if i < 2 else a for i, a in enumerate(arrays)]
        gated_delta.gated_delta_ops(*other)
        assert len(counted) == checked + 1


@pytest.mark.parametrize("wrong", ["values", "gradients", "nan"])
def test_a_wrong_operation_is_not_used(
    wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain: Callable[..., Any] = mx.fast.gated_delta_update

    def update(q: mx.array, *args: Any, **settings: Any) -> Any:
        if wrong == "gradients":
            q = 0.9 * q + 0.1 * mx.stop_gradient(q)
        y, state = plain(q, *args, **settings)
        return {"values": 1.01 * y, "nan": y * float("nan")}.get(wrong, y), state

    monkeypatch.setattr(mx.fast, "gated_delta_update", update)
    arrays = [mx.array(a.astype(np.float32)) for a in numbers()]
    with caplog.at_level(logging.WARNING), fused_delta(frozenset({SHAPE})):
        y, state = gated_delta.gated_delta_ops(*arrays)
        gated_delta.gated_delta_ops(*arrays)
    assert caplog.text.count("differs from mlx-lm's operations") == 1
    expected = recurrence(numbers())
    assert_close(y, expected[0], bound=1e-5)
    assert_close(state, expected[1], bound=1e-5)


def test_shapes_are_read_from_the_names_of_kernels(tmp_path: Path) -> None:
    library = tmp_path / "mlx.metallib"
    names = (
        "seq_gated_delta_vjp_float_128_128_16_32_1",
        "seq_gated_delta_vjp_bfloat16_t_128_128_16_32_16",
        "seq_gated_delta_vjp_float16_t_128_64_24_48_4",
        "seq_gated_delta_float_128_128_1_1_1",
    )
    library.write_bytes(b"\0".join(f"NAME\0{name}\0TYPE".encode() for name in names))
    assert shapes_in(kernel_names(ours._KERNEL, library)) == {
        DeltaShape(key_heads=16, key_width=128, value_heads=32, value_width=128),
        DeltaShape(key_heads=24, key_width=128, value_heads=48, value_width=64),
    }
    assert kernel_names(ours._KERNEL, tmp_path / "none") == frozenset()
    if not mx.metal.is_available():
        assert ours.differentiable_shapes() == frozenset()
