"""The losses of DPO, each a function of the log-probabilities of pairs.

Names and definitions are those of TRL 1.16 (``DPOConfig.loss_type``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

_LARGEST = 80.0
"""Largest exponent of an alpha-divergence, as in TRL."""


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
        reference: log π_ref(chosen) − log π_ref(rejected), which aot sorts.
        real: Which pairs are not there to fill up the batch; None for all.
        divergence: The f-divergence whose derivative scores a ratio.
        alpha: α of ``alpha_divergence``.
    """

    chosen: mx.array
    rejected: mx.array
    chosen_count: mx.array
    rejected_count: mx.array
    cross_entropy: mx.array
    beta: float
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    reference: mx.array | None = None
    real: mx.array | None = None
    divergence: str = "reverse_kl"
    alpha: float = 0.5

    @property
    def scores(self) -> tuple[mx.array, mx.array]:
        """Scores of both answers: the log-ratios, for the reverse KL divergence."""
        score = DIVERGENCES[self.divergence]
        return score(self.chosen, self.alpha), score(self.rejected, self.alpha)

    @property
    def margin(self) -> mx.array:
        """β times the difference of the scores."""
        chosen, rejected = self.scores
        return self.beta * (chosen - rejected)

    @property
    def mean_difference(self) -> mx.array:
        """Difference of the scores per token."""
        chosen, rejected = self.scores
        chosen = chosen / mx.maximum(self.chosen_count, 1)
        return chosen - rejected / mx.maximum(self.rejected_count, 1)


def reverse_kl(ratio: mx.array, alpha: float) -> mx.array:
    """f'(t) = log t (+ 1): the log-ratio itself."""
    return ratio


def forward_kl(ratio: mx.array, alpha: float) -> mx.array:
    """f'(t) = 1 − 1/t."""
    return 1 - mx.exp(-ratio)


def js_divergence(ratio: mx.array, alpha: float) -> mx.array:
    """f'(t) = log(2t/(t + 1)), of Jensen and Shannon."""
    return math.log(2) + nn.log_sigmoid(ratio)


def alpha_divergence(ratio: mx.array, alpha: float) -> mx.array:
    """f'(t) = (t^(α − 1) − 1)/(α − 1); log t for α = 1."""
    power = alpha - 1
    if abs(power) < 1e-6:
        return ratio
    return (mx.exp(mx.minimum(power * ratio, _LARGEST)) - 1) / power


DIVERGENCES: dict[str, Callable[[mx.array, float], mx.array]] = {
    function.__name__: function
    for function in (reverse_kl, forward_kl, js_divergence, alpha_divergence)
}
"""f-DPO's scores of a log-ratio log t (arXiv:2309.16240), by ``f_divergence_type``."""


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


def _smoothed(delta: mx.array, terms: PairTerms) -> mx.array:
    epsilon = terms.label_smoothing
    right = nn.log_sigmoid(terms.beta * delta)
    return -(1 - epsilon) * right - epsilon * nn.log_sigmoid(-terms.beta * delta)


def _minus_of_same_rank(
    values: mx.array, others: mx.array, real: mx.array | None
) -> mx.array:
    """Subtract from each value the other that has its rank among the real pairs."""
    last = real if real is None else mx.where(real, 0.0, math.inf)
    keys = [v if last is None else v + last for v in (values, others)]
    order, other_order = (mx.argsort(mx.stop_gradient(key)) for key in keys)
    return values - others[other_order][mx.argsort(order)]


def aot(terms: PairTerms) -> mx.array:
    """AOT (arXiv:2406.05882) for pairs: log-odds compared by rank in the batch."""
    assert terms.reference is not None
    policy = terms.chosen - terms.rejected + terms.reference
    delta = _minus_of_same_rank(policy, terms.reference, terms.real)
    return _smoothed(delta, terms)


def aot_unpaired(terms: PairTerms) -> mx.array:
    """AOT for unpaired answers: log-ratios compared by rank in the batch."""
    delta = _minus_of_same_rank(terms.chosen, terms.rejected, terms.real)
    return _smoothed(delta, terms)


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
        *(aot, aot_unpaired, apo_zero, apo_down, discopop, sft, sigmoid_norm),
    )
}
"""By ``loss_type``; the first is the default."""
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Those that read ``label_smoothing``."""
BY_SCORES = (
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust"),
    *("discopop", "sft"),
)
"""Those that any f-divergence goes with."""
