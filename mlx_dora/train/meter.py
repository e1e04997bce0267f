"""Adds up losses, tokens and time between two reports."""

import math
import time
from collections.abc import Mapping

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.train.geometry import LayerGeometry, by_layer, summarise
from mlx_dora.train.reports import StepReport


class Meter:
    """Sums of the steps since the last report; they stay lazy until one is made."""

    def __init__(self) -> None:
        self.trained_tokens = 0
        self._began = self._last = time.perf_counter()
        mx.reset_peak_memory()
        self._clear()

    @property
    def seconds(self) -> float:
        """Time since the training began."""
        return time.perf_counter() - self._began

    @property
    def sums(self) -> list[mx.array]:
        """What must be evaluated with each step."""
        return [self._loss, self._tokens]

    def start_step(self) -> None:
        """Start the clock of a step."""
        self._last = time.perf_counter()

    def end_step(self, batches: int) -> None:
        """Stop the clock; the step is evaluated."""
        self._step_seconds += time.perf_counter() - self._last
        self._batches += batches

    def add(self, loss: mx.array, tokens: mx.array) -> None:
        """Add one batch.

        Args:
            loss: Sum over its target tokens.
            tokens: Their number.
        """
        self._loss = self._loss + loss
        self._tokens = self._tokens + tokens

    def check(self, step: int) -> None:
        """Stop when the losses since the last report are not finite.

        Raises:
            DoRAError: Naming the step.
        """
        loss = float(self._loss)
        if not math.isfinite(loss):
            raise DoRAError(
                f"the loss became {loss} by step {step}; nothing was saved since. "
                "Lower the learning rate or the adapter's scale."
            )

    def report(
        self,
        step: int,
        learning_rate: mx.array,
        geometry: Mapping[str, LayerGeometry],
        with_layers: bool,
    ) -> StepReport:
        """Make a report of the steps since the last one, and begin anew.

        Args:
            step: Batches done.
            learning_rate: At this step.
            geometry: Of the DoRA layers, now.
            with_layers: Keep it by layer too.

        Raises:
            DoRAError: If their loss is not finite.
        """
        self.check(step)
        tokens = int(self._tokens)
        self.trained_tokens += tokens
        report = StepReport(
            step=step,
            train_loss=float(self._loss) / max(tokens, 1),
            learning_rate=float(learning_rate),
            tokens_per_second=tokens / self._step_seconds,
            steps_per_second=self._batches / self._step_seconds,
            trained_tokens=self.trained_tokens,
            seconds=self.seconds,
            peak_memory_bytes=mx.get_peak_memory(),
            layers=by_layer(geometry) if geometry and with_layers else None,
            **summarise(geometry),
        )
        self._clear()
        return report

    def validation(self, step: int, loss: float) -> StepReport:
        """Make a report of a validation."""
        return StepReport(
            step=step,
            val_loss=loss,
            trained_tokens=self.trained_tokens,
            seconds=self.seconds,
            peak_memory_bytes=mx.get_peak_memory(),
        )

    def _clear(self) -> None:
        self._loss, self._tokens = mx.array(0.0), mx.array(0)
        self._step_seconds, self._batches = 0.0, 0
