"""Allowed differences between a fused and an unfused model."""

from dataclasses import dataclass, field

from mlx_dora.errors import DoRAError


@dataclass(frozen=True, kw_only=True)
class FuseTolerance:
    """Bounds of a verification, wide enough for the noise of quantization."""

    max_logit_difference: float = field(
        default=0.05,
        metadata={"help": "With --verify: largest relative difference of the logits."},
    )
    max_loss_difference: float = field(
        default=0.01,
        metadata={"help": "With --verify: largest difference of the loss."},
    )
    min_same_tokens: float = field(
        default=0.95,
        metadata={"help": "With --verify: smallest share of equal greedy tokens."},
    )

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            DoRAError: Names the field, the allowed values and the value received.
        """
        for name in ("max_logit_difference", "max_loss_difference"):
            if not getattr(self, name) >= 0:
                raise DoRAError(
                    f"{name} must be at least 0, got {getattr(self, name)!r}."
                )
        if not 0 <= self.min_same_tokens <= 1:
            raise DoRAError(
                f"min_same_tokens must be 0 to 1, got {self.min_same_tokens!r}."
            )
