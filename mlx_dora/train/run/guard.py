"""Skips bad steps, and tracks the best validation."""

import logging
import math
from dataclasses import dataclass

from mlx_dora.errors import DoRAError
from mlx_dora.train.run.state import Saved

logger = logging.getLogger(__name__)


class Guard(Saved):
    """Skips steps that have no target, or whose loss or gradient is not finite.

    Args:
        limit: Stop after this many consecutive steps that are not finite.
    """

    saved = ("in_a_row", "empty", "not_finite")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.in_a_row = 0
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
            self.in_a_row = 0
            return True
        self.not_finite += 1
        self.in_a_row += 1
        what = "loss" if not math.isfinite(loss) else "gradient"
        if self.in_a_row < self._limit:
            logger.warning("step %d skipped: its %s is not finite", step, what)
            return False
        raise DoRAError(
            f"the {what} was not finite in {self.in_a_row} steps in a row, up to step "
            f"{step}: stopped; what was saved before remains. Lower the learning rate "
            "or the adapter's scale, or clip with max_grad_norm."
        )


@dataclass(kw_only=True)
class Best(Saved):
    """The best validation so far, and the number of validations since.

    Args:
        patience: Number of validations without improvement before stopping; 0 for no
            early stop.
        loss: Lowest score (`Objective.score`: the validation loss, unless another
            metric decides); None before the first validation.
        step: Step of the best validation.
        since: Number of validations since the best.
    """

    saved = ("loss", "step", "since")

    patience: int
    loss: float | None = None
    step: int | None = None
    since: int = 0

    def take(self, step: int, loss: float) -> bool:
        """Record a validation's score; return True if it is the best so far."""
        if not math.isfinite(loss) or (self.loss is not None and loss >= self.loss):
            self.since += 1
            return False
        self.loss, self.step, self.since = loss, step, 0
        return True

    @property
    def is_enough(self) -> bool:
        """Whether the training should stop early."""
        return 0 < self.patience <= self.since
