"""The losses of DPO, each a function of the log-probabilities of pairs.

Names and definitions are those of TRL 1.16 (``DPOConfig.loss_type``).
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True, kw_only=True)
class PairTerms:
    """Log-probabilities of pairs, and the settings of the losses.

    All arrays have the shape ``(pairs,)``.

    Args:
        chosen: log π(chosen)/π_ref(chosen), summed over the answer.
        rejected: The same of the rejected answer.
        chosen_count: Number of target tokens of the chosen answer.
        rejected_count: Number of target tokens of the rejected answer.
        cross_entropy: Mean cross-entropy of the chosen tokens of the batch, a scalar.
        beta: β.
        label_smoothing: ε.
        discopop_tau: τ of DiscoPOP.
    """

    chosen: mx.array
    rejected: mx.array
    chosen_count: mx.array
    rejected_count: mx.array
    cross_entropy: mx.array
    beta: float
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    @property
    def margin(self) -> mx.array:
        """β times the difference of the log-ratios."""
        return self.beta * (self.chosen - self.rejected)

    @property
    def mean_difference(self) -> mx.array:
        """Difference of the log-ratios per token."""
        chosen = self.chosen / mx.maximum(self.chosen_count, 1)
        return chosen - self.rejected / mx.maximum(self.rejected_count, 1)


def sigmoid(terms: PairTerms) -> mx.array:
    """DPO (arXiv:2305.18290, Eq. 7)."""
    return -nn.log_sigmoid(terms.margin)


def hinge(terms: PairTerms) -> mx.array:
    """SLiC's hinge (arXiv:2305.10425) on the margin (arXiv:2309.06657)."""
    return mx.maximum(1 - terms.margin, 0)


def ipo(terms: PairTerms) -> mx.array:
    """IPO (arXiv:2310.12036, Eq. 17), log-ratios per token; β is its τ."""
    return mx.square(terms.mean_difference - 1 / (2 * terms.beta))


def exo_pair(terms: PairTerms) -> mx.array:
    """EXO (arXiv:2402.00856, Eq. 16) for two answers, with smoothed labels."""
    margin, epsilon = terms.margin, terms.label_smoothing
    log_right, log_wrong = nn.log_sigmoid(margin), nn.log_sigmoid(-margin)
    right, wrong = mx.sigmoid(margin), mx.sigmoid(-margin)
    return right * (log_right - mx.log1p(mx.array(-epsilon))) + wrong * (
        log_wrong - mx.log(mx.array(epsilon))
    )


def nca_pair(terms: PairTerms) -> mx.array:
    """NCA (arXiv:2402.05369) for two answers."""
    chosen, rejected = terms.beta * terms.chosen, terms.beta * terms.rejected
    return -nn.log_sigmoid(chosen) - 0.5 * (
        nn.log_sigmoid(-chosen) + nn.log_sigmoid(-rejected)
    )


def robust(terms: PairTerms) -> mx.array:
    """Robust DPO (arXiv:2403.00409): unbiased where labels flip with probability ε."""
    epsilon = terms.label_smoothing
    right, wrong = nn.log_sigmoid(terms.margin), nn.log_sigmoid(-terms.margin)
    return (epsilon * wrong - (1 - epsilon) * right) / (1 - 2 * epsilon)


def bco_pair(terms: PairTerms) -> mx.array:
    """BCO (arXiv:2404.04656) for pairs, without the shift."""
    return -nn.log_sigmoid(terms.beta * terms.chosen) - nn.log_sigmoid(
        -terms.beta * terms.rejected
    )


def sppo_hard(terms: PairTerms) -> mx.array:
    """SPPO (arXiv:2405.00675, Eq. 4.7) with probabilities 1 and 0."""
    target = 0.5 / terms.beta
    return mx.square(terms.chosen - target) + mx.square(terms.rejected + target)


def apo_zero(terms: PairTerms) -> mx.array:
    """APO-zero (arXiv:2408.06266, Eq. 7): chosen up, rejected down."""
    return (
        1
        - mx.sigmoid(terms.beta * terms.chosen)
        + mx.sigmoid(terms.beta * terms.rejected)
    )


def apo_down(terms: PairTerms) -> mx.array:
    """APO-down (arXiv:2408.06266, Eq. 8): both down, rejected more."""
    return mx.sigmoid(terms.beta * terms.chosen) + 1 - mx.sigmoid(terms.margin)


def discopop(terms: PairTerms) -> mx.array:
    """DiscoPOP (arXiv:2406.08414, Eq. 5)."""
    share = mx.sigmoid(terms.margin / terms.discopop_tau)
    return (share - 1) * nn.log_sigmoid(terms.margin) + share * mx.exp(-terms.margin)


def sft(terms: PairTerms) -> mx.array:
    """Cross-entropy of the batch's chosen tokens, the same for each pair."""
    return mx.broadcast_to(terms.cross_entropy, terms.chosen.shape)


def sigmoid_norm(terms: PairTerms) -> mx.array:
    """DPO's sigmoid on log-ratios per token."""
    return -nn.log_sigmoid(terms.beta * terms.mean_difference)


LOSSES: dict[str, Callable[[PairTerms], mx.array]] = {
    function.__name__: function
    for function in (
        *(sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard),
        *(apo_zero, apo_down, discopop, sft, sigmoid_norm),
    )
}
"""By ``loss_type``; the first is the default."""
SMOOTHED = ("robust", "exo_pair")
"""Those that read ``label_smoothing``."""
