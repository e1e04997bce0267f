"""Settings of the preference objectives, with TRL's names and defaults."""

from dataclasses import dataclass
from typing import Literal

from mlx_dora.errors import DoRAError
from mlx_dora.options import check_options, option

TruncationMode = Literal["keep_start", "keep_end"]
BestMetric = Literal["loss", "accuracy"]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Settings of dpo, orpo, kto and simpo; names and defaults as in TRL 1.16.

    ``beta`` and ``loss_type`` are those of TRL's config of the objective (DPOConfig,
    KTOConfig, ORPOConfig, or CPOConfig for simpo). ``max_length`` is the training's
    ``max_seq_length``.
    """

    OPTION_GROUP = "Preference (dpo, orpo, kto, simpo)"

    beta: float | None = option(
        None,
        help="Weight of the deviation from the reference (ipo: tau; orpo: lambda; "
        "simpo: scale of the rewards), 0.1 by default; grpo: weight of the KL "
        "divergence, none by default.",
        above=0,
        recorded=True,
    )
    loss_type: tuple[str, ...] | None = option(
        None,
        help="Loss, or several with loss_weights. dpo: sigmoid (default), hinge, ipo, "
        "exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, "
        "apo_down, discopop, sft, sigmoid_norm; kto: kto (default), apo_zero_unpaired; "
        "simpo: simpo; grpo: dapo (default), grpo, bnpo, dr_grpo.",
        recorded=True,
        items="names",
    )
    loss_weights: tuple[float, ...] | None = option(
        None,
        help="dpo: weight of each loss_type; default: 1 each.",
        recorded=True,
        items="numbers",
    )
    label_smoothing: float = option(
        0.0,
        help="Probability that a label is wrong, for robust, exo_pair, aot, "
        "aot_unpaired and simpo.",
        least=0,
        below=0.5,
        recorded=True,
    )
    discopop_tau: float = option(
        0.05, help="Temperature of discopop.", above=0, recorded=True
    )
    f_divergence_type: Divergence = option(
        "reverse_kl",
        help="dpo: divergence from the reference that scores answers (f-DPO).",
        recorded=True,
    )
    f_alpha_divergence_coef: float = option(
        0.5, help="dpo: alpha of alpha_divergence.", least=0, recorded=True
    )
    ld_alpha: float | None = option(
        None,
        help="dpo: weight of the tokens of the longer answer beyond the length of the "
        "shorter (LD-DPO); default: 1.",
        least=0,
        most=1,
        recorded=True,
    )
    desirable_weight: float = option(
        1.0, help="kto: weight of the desirable rows.", least=0, recorded=True
    )
    undesirable_weight: float = option(
        1.0, help="kto: weight of the undesirable rows.", least=0, recorded=True
    )
    simpo_gamma: float = option(
        0.5, help="simpo: target margin of the rewards.", least=0, recorded=True
    )
    cpo_alpha: float = option(
        1.0,
        help="simpo: weight of the chosen answers' cross-entropy, 1 as in TRL's CPO; 0 "
        "for SimPO as published.",
        least=0,
        recorded=True,
    )
    truncation_mode: TruncationMode = option(
        "keep_start",
        help="Which side of a row of more than max_seq_length tokens to keep.",
        recorded=True,
    )
    precompute_reference: bool = option(
        False,
        help="Compute the reference's log-probabilities once, before training, and "
        "keep them in reference.safetensors in the adapter's folder.",
        may_change=True,
    )
    reference_adapter: str | None = option(
        None,
        help="Adapter that is the reference, instead of the base model alone.",
        path="local",
    )
    best_metric: BestMetric = option(
        "loss",
        help="What decides which adapter is the best: the validation loss, or the "
        "accuracy of its preferences (equal accuracies: the loss).",
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            DoRAError: Names the field, the allowed values and the value received.
        """
        check_options(self)
        weights, types = self.loss_weights, self.loss_type or ("",)
        if weights is not None and len(weights) != len(types):
            raise DoRAError(
                f"loss_weights has {len(weights)} weights for {len(types)} loss types: "
                "give one each."
            )
