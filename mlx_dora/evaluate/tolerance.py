"""How far a fused model may be from the unfused one. Imports no MLX."""

from dataclasses import dataclass, field

from mlx_dora.errors import DoRAError


@dataclass(frozen=True, kw_only=True)
class FuseTolerance:
    """Bounds of a verification; what packing to few bits adds as noise fits in."""

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
        metadata={"help": "With --verify: least share of equal greedy tokens."},
    )

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            DoRAError: Naming the field, what is allowed and what came.
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
