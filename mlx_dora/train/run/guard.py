"""What keeps a bad step from spoiling the weights, and a bad end from being kept."""

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

from mlx_dora.errors import DoRAError

logger = logging.getLogger(__name__)


class Guard:
    """Passes over steps without a target or with a loss or gradient that is not finite.

    Args:
        limit: Stop after this many not finite ones in a row.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0
        self.empty = 0
        self.not_finite = 0

    def passes(self, step: int, loss: float, norm: float, tokens: int) -> bool:
        """Whether the step may change the weights.

        Args:
            step: Batches done after it.
            loss: Sum of its losses.
            norm: Of its gradient.
            tokens: Its targets.

        Raises:
            DoRAError: If too many in a row were not finite.
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
            logger.warning("step %d passed over: its %s is not finite", step, what)
            return False
        raise DoRAError(
            f"the {what} was not finite in {self._in_a_row} steps in a row, up to step "
            f"{step}: stopped, with what was saved before. Lower the learning rate or "
            "the adapter's scale, or clip with max_grad_norm."
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "in_a_row": self._in_a_row,
            "empty": self.empty,
            "not_finite": self.not_finite,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._in_a_row = state["in_a_row"]
        self.empty = state["empty"]
        self.not_finite = state["not_finite"]


@dataclass(kw_only=True)
class Best:
    """The best validation so far, and how many since were no better.

    Args:
        patience: Enough after this many; 0 for never.
        loss: Of the best one; None before the first.
        step: Where it was.
        since: Validations after it.
    """

    patience: int
    loss: float | None = None
    step: int | None = None
    since: int = 0

    def take(self, step: int, loss: float) -> bool:
        """Take note of a validation; True if it is the best so far."""
        if not math.isfinite(loss) or (self.loss is not None and loss >= self.loss):
            self.since += 1
            return False
        self.loss, self.step, self.since = loss, step, 0
        return True

    @property
    def is_enough(self) -> bool:
        """Whether to stop early."""
        return 0 < self.patience <= self.since

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; the patience is this run's own."""
        self.loss, self.step = state["loss"], state["step"]
        self.since = state["since"]
