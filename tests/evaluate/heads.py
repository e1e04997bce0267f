"""Gradients of a function of a tiny adapted model's logits, for each kind of head."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.train.run.start import trainable_tensors
from tests.checks import assert_close, to_numpy

KEYS = ("self_attn.q_proj", "mlp.up_proj")

EVERY_HEAD = pytest.mark.parametrize(
    ("tied", "keys"),
    [(True, KEYS), (True, (*KEYS, "model.embed_tokens")), (False, (*KEYS, "lm_head"))],
)


def gradients(
    model: nn.Module,
    function: Callable[..., Any],
    batch: tuple[mx.array, ...],
    compiled: bool = False,
) -> tuple[mx.array, mx.array, dict[str, Any]]:
    """Both outputs of ``function(model, *batch)``, and the gradient of the first."""
    differentiate = partial(nn.value_and_grad(model, function), model)
    if compiled:
        differentiate = mx.compile(
            differentiate, inputs=model.state, outputs=model.state
        )
    (value, other), gradient = differentiate(*batch)
    return value, other, dict(tree_flatten(gradient))


def assert_same_gradients(
    model: nn.Module,
    keys: tuple[str, ...],
    ours: Callable[..., Any],
    truth: Callable[..., Any],
    batch: tuple[mx.array, ...],
    compiled: bool,
) -> None:
    """Adapt the model, then compare both outputs and the gradient with the truth's."""
    apply_dora(model, DoRAConfig(rank=4, scale=2.0, keys=keys, num_layers=-1))
    flat = trainable_tensors(model).items()
    noise = [(n, v + 0.1 * mx.random.normal(v.shape)) for n, v in flat]
    model.load_weights(noise, strict=False)
    model.train()
    *outputs, expected = gradients(model, truth, batch)
    *values, actual = gradients(model, ours, batch, compiled)
    for value, output in zip(values, outputs, strict=True):
        assert_close(value, to_numpy(output))
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert_close(gradient, to_numpy(expected[name]), bound=2e-5)
