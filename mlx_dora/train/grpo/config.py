"""Settings of GRPO, with TRL's names and defaults."""

from dataclasses import dataclass
from typing import Any, Literal

from mlx_dora.errors import DoRAError
from mlx_dora.options import check_options, option

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
SamplingLevel = Literal["token", "sequence"]


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Settings of GRPO (arXiv:2402.03300), named and defaulted as in TRL 1.16.

    ``batch_size`` counts prompts, each with ``num_generations`` completions (TRL's
    ``per_device_train_batch_size`` counts completions). The completions of an update,
    ``grad_accumulation_steps`` batches, are sampled at once, as with TRL's default
    ``steps_per_generation``, and used for ``num_iterations`` updates.

    ``loss_type`` names the normalization: ``grpo`` averages over the tokens of each
    completion, then over completions; ``bnpo`` over the tokens of each batch; ``dapo``
    (arXiv:2503.14476) over the tokens of the whole update; ``dr_grpo``
    (arXiv:2503.20783) divides by the constant ``max_completion_length``, usually with
    ``scale_rewards`` ``none``.
    """

    OPTION_GROUP = "GRPO"

    reward_funcs: tuple[str, ...] = option(
        (),
        help="Rewards: shipped ones (exact_match, number_match, regex_match, "
        "valid_json) or dotted names of Python functions, as package.module.function.",
    )
    reward_weights: tuple[float, ...] | None = option(
        None, help="Weight of each reward; default: 1 for each.", items="numbers"
    )
    reward_arguments: dict[str, Any] | None = option(
        None,
        help="Keyword arguments of rewards, by name, such as "
        "{regex_match: {pattern: '[0-9]+'}}.",
    )
    num_generations: int = option(
        8, help="Completions per prompt.", least=2, recorded=True
    )
    num_generations_eval: int | None = option(
        None,
        help="Completions per prompt in validation; default: num_generations.",
        least=1,
    )
    max_completion_length: int = option(
        512, help="Most tokens of a completion.", least=1, recorded=True
    )
    temperature: float = option(
        1.0, help="Temperature of sampling.", above=0, recorded=True
    )
    top_p: float = option(
        1.0,
        help="Sample from the most likely tokens of this total probability.",
        above=0,
        most=1,
        recorded=True,
    )
    top_k: int = option(
        0,
        help="Sample from this many most likely tokens; 0 for all.",
        least=0,
        recorded=True,
    )
    min_p: float | None = option(
        None,
        help="Sample only tokens whose probability is at least this times that of the "
        "most likely token.",
        least=0,
        most=1,
        recorded=True,
    )
    stop_words: tuple[str, ...] = option(
        (),
        help="Texts that end a completion, besides the tokenizer's end tokens.",
        recorded=True,
    )
    sampling_rows: int = option(
        32, help="Completions that are sampled at the same time.", least=1
    )
    num_iterations: int = option(
        1, help="Passes over the sampled completions.", least=1, recorded=True
    )
    loss_type: LossType = option(
        "dapo",
        help="Normalization of the loss: by completion (grpo), by batch (bnpo), by "
        "update (dapo) or by a constant (dr_grpo).",
        recorded=True,
    )
    scale_rewards: ScaleRewards = option(
        "group",
        help="Divide advantages by the standard deviation of the rewards of the "
        "prompt's group, of all that were sampled together, or not.",
        recorded=True,
    )
    multi_objective_aggregation: Aggregation = option(
        "sum_then_normalize",
        help="Sum the weighted rewards and scale the sum, or scale each reward in its "
        "group, then sum.",
        recorded=True,
    )
    epsilon: float = option(
        0.2,
        help="Clip the ratio of probabilities below at 1 - epsilon.",
        least=0,
        recorded=True,
    )
    epsilon_high: float | None = option(
        None,
        help="Clip the ratio above at 1 + epsilon_high; default: epsilon.",
        least=0,
        recorded=True,
    )
    delta: float | None = option(
        None,
        help="Bound the ratio by this where the advantage is negative too (two-sided "
        "clipping).",
        above=0,
        recorded=True,
    )
    importance_sampling_level: SamplingLevel = option(
        "token",
        help="Ratio of probabilities per token, or per sequence (GSPO).",
        recorded=True,
    )
    beta: float = option(
        0.0,
        help="Coefficient of the KL divergence to the reference; 0 for none.",
        least=0,
        recorded=True,
    )
    use_bias_correction_kl: bool = option(
        True,
        help="Multiply the KL divergence by the ratio of probabilities.",
        recorded=True,
    )
    reference_adapter: str | None = option(
        None,
        help="Adapter that is the reference, instead of the base model alone.",
        path="local",
    )
    mask_truncated_completions: bool = option(
        False,
        help="Leave completions that reach max_completion_length out of the loss.",
        recorded=True,
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            DoRAError: Names the field, the allowed values and the value received.
        """
        check_options(self)
        names, weights = self.reward_funcs, self.reward_weights
        if weights is not None and len(weights) != len(names):
            raise DoRAError(
                f"reward_weights must have one weight for each of the {len(names)} "
                f"reward_funcs, got {len(weights)}."
            )
        unknown = [name for name in self.reward_arguments or {} if name not in names]
        if unknown:
            raise DoRAError(
                f"reward_arguments names {', '.join(map(repr, unknown))}, which is not "
                f"among the reward_funcs {', '.join(names) or '(none)'}."
            )
        for name, arguments in (self.reward_arguments or {}).items():
            if not isinstance(arguments, dict):
                raise DoRAError(
                    f"reward_arguments {name!r} must be a mapping of argument names to "
                    f"values, got {arguments!r:.60}."
                )

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each reward."""
        return tuple(self.reward_weights or [1.0] * len(self.reward_funcs))

    @property
    def clip(self) -> tuple[float, float]:
        """The bounds of the ratio of probabilities."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1 - self.epsilon, 1 + high
