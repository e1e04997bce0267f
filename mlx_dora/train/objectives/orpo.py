"""ORPO: odds ratio preference optimization (arXiv:2403.07691), without a reference."""

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.evaluate.log_probabilities import row_log_probs
from mlx_dora.evaluate.loss import target_mask
from mlx_dora.train.objectives.objective import Outputs, metric_table
from mlx_dora.train.objectives.preference import (
    PAIR_METRICS,
    Preference,
    pair_table,
    split_pairs,
)

_LOG_HALF = -0.6931471805599453


def log_odds(log_prob: mx.array) -> mx.array:
    r"""Logarithm of the odds :math:`p/(1-p)` of a log-probability below 0."""
    # Each side of -ln 2 avoids the cancellation of the other, as in TRL.
    is_small = log_prob < _LOG_HALF
    small = mx.where(is_small, log_prob, -1.0)
    large = mx.where(is_small, -0.1, log_prob)
    rest = mx.where(is_small, mx.log1p(-mx.exp(small)), mx.log(-mx.expm1(large)))
    return log_prob - rest


def odds_ratio(chosen: mx.array, rejected: mx.array) -> mx.array:
    r"""Logarithm of the odds ratio of two answers, from log-probabilities per token.

    Args:
        chosen: Mean log-probability of the chosen answers' tokens. Shape ``(pairs,)``.
        rejected: The same of the rejected answers.
    """
    return log_odds(chosen) - log_odds(rejected)


class Orpo(Preference):
    r"""Odds ratio preference optimization.

    The loss is the cross-entropy of the chosen rows, prompts included, minus
    :math:`\beta` times the mean of the log-sigmoid of `odds_ratio`.
    """

    name: ClassVar[str] = "orpo"
    has_reference: ClassVar[bool] = False
    metrics: tuple[str, ...] = (
        *PAIR_METRICS,
        "nll_loss",
        "log_odds_ratio",
        "log_odds_chosen",
    )

    def loss(self, model: nn.Module, *batch: mx.array) -> Outputs:
        """The loss of the pairs, their number, tokens and metrics.

        Args:
            model: The model.
            *batch: Tokens and marks of the chosen rows, then of the rejected rows.
        """
        tokens, marks = batch
        positions, pairs = tokens.shape[1] - 1, tokens.shape[0] // 2
        whole = target_mask(marks * mx.array([0, 1]), positions)
        answers = target_mask(marks, positions)
        is_row = answers.any(axis=1, keepdims=True)
        is_chosen = mx.arange(2 * pairs)[:, None] < pairs
        mask = mx.where(is_chosen, whole & is_row, answers)
        found = row_log_probs(model, tokens, marks, mask=mask)
        entropies = -found.each[:pairs].sum() / mx.maximum(mask[:pairs].sum(), 1)
        chosen_count, rejected_count = split_pairs(found.count)
        real = (chosen_count > 0) & (rejected_count > 0)
        chosen, rejected = split_pairs(mx.where(found.count > 0, found.mean, -1.0))
        odds = odds_ratio(chosen, rejected)
        ratios = nn.log_sigmoid(odds)
        count = real.sum()
        mean = mx.where(real, ratios, 0.0).sum() / mx.maximum(count, 1)
        table = pair_table(
            self.beta * chosen, self.beta * rejected, chosen, rejected, real
        )
        more = metric_table(
            (entropies, mask[:pairs].sum()), (ratios, real), (odds, real)
        )
        table = mx.concatenate([table, more])
        return entropies - self.beta * mean, count, mask.sum(), table
