from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.data.batches import pad_batch
from mlx_dora.evaluate.log_probabilities import row_log_probs
from tests.checks import assert_close, to_numpy
from tests.evaluate.heads import EVERY_HEAD, KEYS, assert_same_gradients

BATCH = pad_batch([(list(range(3, 40)), 9), (list(range(50, 71)), 6)], 64)
WEIGHTS = mx.array([0.7, -1.3])
"""Some derivative of a loss with respect to the rows' log-probabilities."""


def weighted(model: nn.Module, tokens: mx.array, marks: mx.array) -> Any:
    found = row_log_probs(model, tokens, marks)
    return (WEIGHTS * found.total).sum() + 0.1 * mx.square(found.each).sum(), found.each


def weighted_by_definition(model: nn.Module, tokens: mx.array, marks: mx.array) -> Any:
    logits = model(tokens[:, :-1]).astype(mx.float32)
    each = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    each = mx.take_along_axis(each, tokens[:, 1:, None], axis=-1)[..., 0]
    steps = mx.arange(1, tokens.shape[1])
    each = each * ((steps >= marks[:, 0:1]) & (steps < marks[:, 1:]))
    total = each.sum(axis=1)
    return (WEIGHTS * total).sum() + 0.1 * mx.square(each).sum(), each


@pytest.mark.usefixtures("few_logits")
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.compiled)]
)
@pytest.mark.parametrize("bits", [None, 4])
@EVERY_HEAD
def test_gradients_equal_those_from_all_logits(
    make_tiny_model: Callable[..., nn.Module],
    tied: bool,
    keys: tuple[str, ...],
    bits: int | None,
    compiled: bool,
) -> None:
    model = make_tiny_model(tie_word_embeddings=tied, bits=bits)
    assert_same_gradients(
        model, keys, weighted, weighted_by_definition, BATCH, compiled
    )


@pytest.mark.usefixtures("few_logits")
def test_values_without_gradient_equal_numpy(tiny_model: nn.Module) -> None:
    tokens, marks = BATCH
    logits = to_numpy(tiny_model(tokens[:, :-1]))
    logits -= logits.max(-1, keepdims=True)
    each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = np.take_along_axis(each, np.array(tokens)[:, 1:, None], -1)[..., 0]
    steps, limits = np.arange(1, tokens.shape[1]), np.array(marks)
    mask = (steps >= limits[:, :1]) & (steps < limits[:, 1:])
    found = row_log_probs(tiny_model, tokens, marks, gradient=False)
    assert_close(found.each, each * mask)
    assert_close(found.total, (each * mask).sum(1))
    assert_close(found.mean, (each * mask).sum(1) / mask.sum(1))
    assert found.count.tolist() == mask.sum(1).tolist() == [28, 15]


def test_a_wider_mask_computes_more_than_the_targets(tiny_model: nn.Module) -> None:
    tokens, marks = BATCH
    whole = pad_batch([(list(range(3, 40)), 0), (list(range(50, 71)), 0)], 64)[1]
    everything = row_log_probs(tiny_model, tokens, whole, gradient=False)
    found = row_log_probs(
        tiny_model, tokens, marks, gradient=False, mask=everything.mask
    )
    assert_close(found.each, to_numpy(everything.each))
    assert found.count.tolist() == [28, 15]
    narrow = row_log_probs(tiny_model, tokens, marks, gradient=False)
    assert_close(found.total, to_numpy(narrow.total))


@pytest.mark.usefixtures("few_logits")
def test_all_logits_never_exist(make_tiny_model: Callable[..., nn.Module]) -> None:
    model = make_tiny_model(vocab_size=80_000, tie_word_embeddings=True)
    apply_dora(model, DoRAConfig(rank=4, keys=KEYS, num_layers=-1))
    model.train()
    tokens = mx.random.randint(0, 80_000, (4, 129))
    marks = mx.array([[1, 129]] * 4)

    def loss(model: nn.Module) -> mx.array:
        return mx.square(row_log_probs(model, tokens, marks).total).sum()

    differentiate = nn.value_and_grad(model, loss)
    mx.eval(model.state, tokens)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(differentiate(model))
    assert mx.get_peak_memory() - before < 4 * 128 * 80_000 * 4 / 2
