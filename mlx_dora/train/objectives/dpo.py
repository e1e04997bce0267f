"""DPO: direct preference optimization (arXiv:2305.18290) and its relatives."""

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.log_probabilities import LogProbs, row_log_probs
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.objectives.dpo_losses import (
    BY_SCORES,
    LOSSES,
    SMOOTHED,
    PairTerms,
)
from mlx_dora.train.objectives.objective import Outputs
from mlx_dora.train.objectives.preference import Preference, pair_table, split_pairs


class Dpo(Preference):
    r"""Direct preference optimization.

    With :math:`\rho = \log\pi(y|x) - \log\pi_\text{ref}(y|x)` of the chosen and of the
    rejected answer, the reward of an answer is :math:`\beta\rho`, and the loss of a
    pair is :math:`-\log\sigma(\beta(\rho_c - \rho_r))` (``sigmoid``) or another of
    `LOSSES`. Several are added with their weights.
    """

    name: ClassVar[str] = "dpo"
    loss_types: ClassVar[tuple[str, ...]] = tuple(LOSSES)
    uses: ClassVar[tuple[str, ...]] = (
        "loss_weights",
        "label_smoothing",
        "discopop_tau",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "ld_alpha",
    )

    def check(self, train: TrainConfig, dora: DoRAConfig) -> None:
        """Refuse settings that the chosen losses do not read."""
        super().check(train, dora)
        smoothing, types = self.config.label_smoothing, self.loss_type
        if smoothing and not {*types} & {*SMOOTHED}:
            raise DoRAError(
                f"label_smoothing {smoothing} is not read by loss_type "
                f"{','.join(types)}: use {' or '.join(SMOOTHED)}, or leave it out."
            )
        self._check_divergence()
        if self.config.ld_alpha is not None and self.config.precompute_reference:
            raise DoRAError(
                "ld_alpha weighs an answer's tokens by the length of the other of its "
                "pair, which precompute_reference does not read: leave one out."
            )
        if "exo_pair" in types and not smoothing:
            raise DoRAError(
                "loss_type exo_pair takes the logarithm of label_smoothing: set it "
                "above 0, such as 0.001."
            )

    def _check_divergence(self) -> None:
        kind, others = self.config.f_divergence_type, {*self.loss_type} - {*BY_SCORES}
        if kind != "reverse_kl" and others:
            raise DoRAError(
                f"f_divergence_type {kind} does not apply to loss_type "
                f"{','.join(sorted(others))}: use {', '.join(BY_SCORES)}."
            )
        default = PreferenceConfig().f_alpha_divergence_coef
        given = self.config.f_alpha_divergence_coef
        if kind != "alpha_divergence" and given != default:
            raise DoRAError(
                f"f_alpha_divergence_coef {given} is read with f_divergence_type "
                f"alpha_divergence alone, not with {kind}: leave it out."
            )

    def loss(self, model: nn.Module, *batch: mx.array) -> Outputs:
        """The mean loss of the pairs, their number, tokens and metrics.

        Args:
            model: The model.
            *batch: Tokens and marks of the chosen rows, then of the rejected rows, and
                the reference's log-probability of each.
        """
        tokens, marks, reference = batch
        found = row_log_probs(model, tokens, marks)
        chosen, rejected = split_pairs(self.row_totals(found))
        chosen_count, rejected_count = split_pairs(found.count)
        base_chosen, base_rejected = split_pairs(reference)
        real = (chosen_count > 0) & (rejected_count > 0)
        terms = PairTerms(
            chosen=chosen - base_chosen,
            rejected=rejected - base_rejected,
            chosen_count=chosen_count,
            rejected_count=rejected_count,
            cross_entropy=-split_pairs(found.total)[0].sum()
            / mx.maximum(chosen_count.sum(), 1),
            reference=base_chosen - base_rejected,
            real=real,
            **self._settings(),
        )
        count = real.sum()
        table = pair_table(
            self.beta * terms.chosen, self.beta * terms.rejected, chosen, rejected, real
        )
        total = mx.where(real, self.losses(terms), 0.0).sum()
        return total / mx.maximum(count, 1), count, found.count.sum(), table

    def row_totals(self, found: LogProbs) -> mx.array:
        """The log-probability of each answer, its tail weighted by `ld_alpha`."""
        if self.config.ld_alpha is None:
            return found.total
        shorter = mx.minimum(*split_pairs(found.count))
        place = mx.cumsum(found.mask.astype(mx.int32), axis=1)  # from 1 in an answer
        is_tail = place > mx.concatenate([shorter, shorter])[:, None]
        each = mx.where(is_tail, self.config.ld_alpha * found.each, found.each)
        return mx.where(found.mask, each, 0.0).sum(axis=1)

    def losses(self, terms: PairTerms) -> mx.array:
        """The loss of each pair: the weighted sum of all loss types."""
        weights = self.config.loss_weights or (1.0,) * len(self.loss_type)
        named = zip(self.loss_type, weights, strict=True)
        return sum(
            (weight * LOSSES[name](terms) for name, weight in named),
            start=mx.array(0.0),
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "beta": self.beta,
            "label_smoothing": self.config.label_smoothing,
            "discopop_tau": self.config.discopop_tau,
            "divergence": self.config.f_divergence_type,
            "alpha": self.config.f_alpha_divergence_coef,
        }
