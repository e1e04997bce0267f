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


def test_differences_are_over_real_tokens_alone(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    one: Any = make_tiny_model()
    two: Any = make_tiny_model()
    two.model.embed_tokens.weight = one.model.embed_tokens.weight * 1.01
    found = compare_probe(two, take_probe(one, EXAMPLES))
    a, b = [], []
    for tokens, _ in EXAMPLES:
        ids = mx.array([tokens[:-1]])
        a.append(to_numpy(one(ids))[0])
        b.append(to_numpy(two(ids))[0])
    before, after = np.concatenate(a), np.concatenate(b)
    error = after - before
    relative = np.sqrt((error**2).mean() / (before**2).mean())
    assert found.max_logit_difference == pytest.approx(np.abs(error).max(), rel=1e-4)
    assert found.relative_logit_difference == pytest.approx(relative, rel=1e-4)
    expected = evaluate_loss(two, EXAMPLES).loss - evaluate_loss(one, EXAMPLES).loss
    assert found.loss_difference == pytest.approx(expected, abs=2e-6)
    assert found.same_top_token == pytest.approx(
        (before.argmax(-1) == after.argmax(-1)).mean()
    )
