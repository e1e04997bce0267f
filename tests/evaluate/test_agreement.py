from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.evaluate.agreement import agreement, compare_probe, take_probe
from mlx_dora.evaluate.loss import evaluate_loss
from tests.checks import to_numpy

EXAMPLES = [(list(range(3, 30)), 0), ([5, 9, 7, 11], 0)]


def test_a_model_agrees_with_itself(tiny_model: nn.Module) -> None:
    same = agreement(tiny_model, tiny_model, EXAMPLES)
    assert same.max_logit_difference == 0
    assert same.loss_difference == 0
    assert same.same_top_token == 1
    assert same.tokens == 26 + 3
    assert same.loss == pytest.approx(evaluate_loss(tiny_model, EXAMPLES).loss)


def test_differences_exclude_padding(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    first: Any = make_tiny_model()
    second: Any = make_tiny_model()
    second.model.embed_tokens.weight = first.model.embed_tokens.weight * 1.01
    result = compare_probe(second, take_probe(first, EXAMPLES))
    a, b = [], []
    for tokens, _ in EXAMPLES:
        ids = mx.array([tokens[:-1]])
        a.append(to_numpy(first(ids))[0])
        b.append(to_numpy(second(ids))[0])
    before, after = np.concatenate(a), np.concatenate(b)
    error = after - before
    relative = np.sqrt((error**2).mean() / (before**2).mean())
    assert result.max_logit_difference == pytest.approx(np.abs(error).max(), rel=1e-4)
    assert result.relative_logit_difference == pytest.approx(relative, rel=1e-4)
    losses = [evaluate_loss(model, EXAMPLES).loss for model in (first, second)]
    assert result.loss_difference == pytest.approx(losses[1] - losses[0], abs=2e-6)
    assert result.same_top_token == pytest.approx(
        (before.argmax(-1) == after.argmax(-1)).mean()
    )
