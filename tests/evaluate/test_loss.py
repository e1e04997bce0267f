import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.data.batches import pad_batch
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import evaluate_loss, loss_fn, target_mask
from tests.checks import assert_close, to_numpy

EXAMPLES = [
    (list(range(3, 40)), 0),
    ([5, 9, 7, 11], 2),
    ([8, 1], 1),
    (list(range(60, 90)), 29),
]


def token_losses(model: nn.Module, tokens: list[int]) -> np.ndarray:
    """Losses of tokens 1 onward of an unpadded row, in float64."""
    logits = to_numpy(model(mx.array([tokens[:-1]])))[0]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=-1))
    return log_sum - shifted[np.arange(len(tokens) - 1), tokens[1:]]


def summed(model: nn.Module, tokens: list[int], first: int) -> tuple[float, int]:
    losses = token_losses(model, tokens)[max(first - 1, 0) :]
    return float(losses.sum()), len(losses)


def expected_loss(model: nn.Module, limit: int = 10_000) -> tuple[float, int]:
    cut = [(tokens[:limit], first) for tokens, first in EXAMPLES]
    parts = [summed(model, *row) for row in cut if len(row[0]) > max(row[1], 1)]
    total = sum(count for _, count in parts)
    return sum(loss for loss, _ in parts) / total, total


def test_loss_is_the_mean_over_target_tokens(tiny_model: nn.Module) -> None:
    value, count = loss_fn(tiny_model, *pad_batch(EXAMPLES, 2048))
    loss, tokens = expected_loss(tiny_model)
    assert int(count) == tokens == 36 + 2 + 1 + 1
    assert_close(value, np.array(loss))


def test_mask_ends_with_the_last_token() -> None:
    lengths = mx.array([[0, 3], [2, 5], [4, 4], [0, 1]])
    mask = target_mask(lengths, 5).tolist()
    assert mask == [
        [True, True, False, False, False],
        [False, True, True, True, False],
        [False] * 5,
        [False] * 5,
    ]


def test_loss_of_a_batch_without_targets_is_zero(tiny_model: nn.Module) -> None:
    value, count = loss_fn(tiny_model, *pad_batch([([4, 5, 6], 3)], 2048))
    assert float(value) == 0
    assert int(count) == 0


def test_padding_does_not_reach_the_gradient(tiny_model: Any) -> None:
    def gradient(examples: list[tuple[list[int], int]]) -> mx.array:
        def value(weight: mx.array) -> mx.array:
            tiny_model.model.embed_tokens.weight = weight
            return loss_fn(tiny_model, *pad_batch(examples, 2048))[0]

        return mx.grad(value)(tiny_model.model.embed_tokens.weight)

    alone = gradient([EXAMPLES[1]])
    beside = gradient([EXAMPLES[1], ([7] * 90, 90)])
    assert_close(beside, to_numpy(alone), bound=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_evaluate_loss_weighs_every_token_the_same(
    tiny_model: nn.Module, batch_size: int
) -> None:
    result = evaluate_loss(tiny_model, EXAMPLES, batch_size=batch_size)
    loss, tokens = expected_loss(tiny_model)
    assert result.tokens == tokens
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert (result.rows, result.rows_truncated, result.rows_skipped) == (4, 0, 0)


def test_evaluate_loss_counts_truncated_and_skipped_rows(tiny_model: nn.Module) -> None:
    done: list[int] = []
    result = evaluate_loss(
        tiny_model, EXAMPLES, batch_size=2, max_seq_length=20, progress=done.append
    )
    assert sum(done) == len(EXAMPLES) == result.rows  # so that a bar ends
    assert done[1:] == [1]
    loss, tokens = expected_loss(tiny_model, limit=20)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert (result.tokens, result.rows_truncated, result.rows_skipped) == (tokens, 2, 1)


def test_evaluate_loss_restores_the_mode(tiny_model: Any) -> None:
    tiny_model.train()
    evaluate_loss(tiny_model, EXAMPLES)
    assert tiny_model.training
    assert tiny_model.model.layers[0].training


def test_half_precision_loss_is_reduced_in_float32(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model = make_tiny_model(dtype=mx.bfloat16)
    result = evaluate_loss(model, EXAMPLES)
    loss, _ = expected_loss(model)
    assert result.loss == pytest.approx(loss, rel=1e-4)


def test_nothing_to_measure_is_an_error(tiny_model: nn.Module) -> None:
    with pytest.raises(DoRAError, match="no row has a target token"):
        evaluate_loss(tiny_model, [([4, 5, 6], 3)])
