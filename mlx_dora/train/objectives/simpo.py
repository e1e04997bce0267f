"""SimPO (arXiv:2405.14734), in the form of TRL's CPO with ``loss_type="simpo"``."""

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.evaluate.log_probabilities import row_log_probs
from mlx_dora.train.objectives.objective import Outputs, metric_table
from mlx_dora.train.objectives.preference import (
    PAIR_METRICS,
    Preference,
    pair_table,
    split_pairs,
)


def simpo_losses(
    chosen: mx.array,
    rejected: mx.array,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> mx.array:
    r"""The loss :math:`-\log\sigma(\beta(\ell_c - \ell_r) - \gamma)` of each pair.

    Args:
        chosen: Mean log-probability of the chosen answers' tokens. Shape ``(pairs,)``.
        rejected: The same of the rejected answers.
        beta: β.
        gamma: Target margin γ.
        label_smoothing: Probability that a label is wrong.
    """
    margin = beta * (chosen - rejected) - gamma
    right, wrong = nn.log_sigmoid(margin), nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


class Simpo(Preference):
    """Simple preference optimization: rewards are log-probabilities per token.

    ``cpo_alpha`` times the cross-entropy of the chosen answers is added, as in CPO
    (arXiv:2401.08417).
    """

    name: ClassVar[str] = "simpo"
    loss_types: ClassVar[tuple[str, ...]] = ("simpo",)
    uses: ClassVar[tuple[str, ...]] = ("simpo_gamma", "cpo_alpha", "label_smoothing")
    has_reference: ClassVar[bool] = False
    metrics: tuple[str, ...] = (*PAIR_METRICS, "nll_loss")

    def loss(self, model: nn.Module, *batch: mx.array) -> Outputs:
        """The loss of the pairs, their number, tokens and metrics.

        Args:
            model: The model.
            *batch: Tokens and marks of the chosen rows, then of the rejected rows.
        """
        tokens, marks = batch
        found = row_log_probs(model, tokens, marks)
        chosen_count, rejected_count = split_pairs(found.count)
        real = (chosen_count > 0) & (rejected_count > 0)
        chosen, rejected = split_pairs(found.mean)
        losses = simpo_losses(
            chosen,
            rejected,
            beta=self.beta,
            gamma=self.config.simpo_gamma,
            label_smoothing=self.config.label_smoothing,
        )
        count, words = real.sum(), chosen_count.sum()
        entropy = -split_pairs(found.total)[0].sum() / mx.maximum(words, 1)
        mean = mx.where(real, losses, 0.0).sum() / mx.maximum(count, 1)
        table = pair_table(
            self.beta * chosen, self.beta * rejected, chosen, rejected, real
        )
        table = mx.concatenate([table, metric_table((entropy, words))])
        total = mean + self.config.cpo_alpha * entropy
        return total, count, found.count.sum(), table
