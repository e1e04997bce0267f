"""Allowed differences between a fused and an unfused model."""

from dataclasses import dataclass

from mlx_dora.options import check_options, option


@dataclass(frozen=True, kw_only=True)
class FuseTolerance:
    """Bounds of a verification, wide enough for the noise of quantization."""

    max_logit_difference: float = option(
        0.05,
        help="With --verify: largest relative difference of the logits.",
        least=0,
    )
    max_loss_difference: float = option(
        0.01, help="With --verify: largest difference of the loss.", least=0
    )
    min_same_tokens: float = option(
        0.95,
        help="With --verify: smallest share of equal greedy tokens.",
        least=0,
        most=1,
    )

    def __post_init__(self) -> None:
        check_options(self)
