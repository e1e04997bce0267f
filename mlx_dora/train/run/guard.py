"""Skips bad steps, and tracks the best validation."""

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

from mlx_dora.errors import DoRAError

logger = logging.getLogger(__name__)


class Guard:
    """Skips steps that have no target, or whose loss or gradient is not finite.

    Args:
        limit: Stop after this many consecutive steps that are not finite.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0
        self.empty = 0
        self.not_finite = 0

    def passes(self, step: int, loss: float, norm: float, tokens: int) -> bool:
        """Whether the step may change the weights.

        Args:
            step: Number of batches after the step.
            loss: Sum of the step's losses.
            norm: Norm of the step's gradient.
            tokens: Number of the step's targets.

        Raises:
            DoRAError: If too many consecutive steps were not finite.
        """
        if tokens == 0:
            self.empty += 1
            return False
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row = 0
            return True
        self.not_finite += 1
        self._in_a_row += 1
        what = "loss" if not math.isfinite(loss) else "gradient"
        if self._in_a_row < self._limit:
            logger.warning("step %d skipped: its %s is not finite", step, what)
            return False
        raise DoRAError(
            f"the {what} was not finite in {self._in_a_row} steps in a row, up to step "
            f"{step}: stopped; what was saved before remains. Lower the learning rate "
            "or the adapter's scale, or clip with max_grad_norm."
        )

    def state(self) -> dict[str, Any]:
        """The values that a checkpoint stores."""
        return {
            "in_a_row": self._in_a_row,
            "empty": self.empty,
            "not_finite": self.not_finite,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the values of `state`."""
        self._in_a_row = state["in_a_row"]
        self.empty = state["empty"]
        self.not_finite = state["not_finite"]


@dataclass(kw_only=True)
class Best:
    """The best validation so far, and the number of validations since.

    Args:
        patience: Number of validations without improvement before stopping; 0 for no
            early stop.
        loss: Best validation loss; None before the first validation.
        step: Step of the best validation.
        since: Number of validations since the best.
    """

    patience: int
    loss: float | None = None
    step: int | None = None
    since: int = 0

    def take(self, step: int, loss: float) -> bool:
        """Record a validation; return True if it is the best so far."""
        if not math.isfinite(loss) or (self.loss is not None and loss >= self.loss):
            self.since += 1
            return False
        self.loss, self.step, self.since = loss, step, 0
        return True

    @property
    def is_enough(self) -> bool:
        """Whether the training should stop early."""
        return 0 < self.patience <= self.since

    def state(self) -> dict[str, Any]:
        """The values that a checkpoint stores."""
        return asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the values of `state`, except the patience."""
        self.loss, self.step = state["loss"], state["step"]
        self.since = state["since"]
