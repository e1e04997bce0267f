"""Sums losses, tokens and time between reports."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

import mlx.core as mx

from mlx_dora.train.geometry import LayerGeometry, summarise
from mlx_dora.train.run.journal import StepReport
from mlx_dora.train.run.state import Saved
from mlx_dora.train.stepper import Gradient


class Meter(Saved):
    """Sums over the steps since the last report, and over the whole training."""

    saved = (
        *("loss", "count", "tokens", "table", "batches", "step_seconds"),
        *("trained_tokens", "seconds"),
    )

    def __init__(self) -> None:
        self.trained_tokens = 0
        self._began = self._last = time.perf_counter()
        mx.reset_peak_memory()
        self._clear()

    @property
    def seconds(self) -> float:
        """Time since the training began, without the pause before a resume."""
        return time.perf_counter() - self._began

    @seconds.setter
    def seconds(self, seconds: float) -> None:
        self._began = time.perf_counter() - seconds

    def start_step(self) -> None:
        """Start timing a step."""
        self._last = time.perf_counter()

    def end_step(self, batches: int) -> None:
        """Stop timing a step, once its arrays are evaluated."""
        self.step_seconds += time.perf_counter() - self._last
        self.batches += batches

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the values of `state`; version 0.1 summed over targets alone."""
        super().restore({"count": state["tokens"], "table": [], **state})

    def add(self, gradient: Gradient) -> None:
        """Add the losses of a step."""
        self.loss += gradient.loss
        self.count += gradient.count
        self.tokens += gradient.tokens
        pairs = zip_longest(self.table, gradient.table, fillvalue=0.0)
        self.table = [total + value for total, value in pairs]

    def report(
        self,
        step: int,
        learning_rate: mx.array,
        geometry: Mapping[str, LayerGeometry],
        *,
        with_layers: bool = False,
        skipped: int = 0,
        batch_shapes: int | None = None,
        step_arrays: int | None = None,
        live_arrays: int | None = None,
        values: Callable[[Sequence[float]], dict[str, float]] = lambda _: {},
    ) -> StepReport:
        """Report the steps since the last report, and reset the sums.

        Args:
            step: Number of batches done.
            learning_rate: Learning rate at this step, a scalar.
            geometry: Current geometry of the DoRA layers.
            with_layers: Whether to report the geometry of each layer.
            skipped: Number of steps skipped so far.
            batch_shapes: Number of shapes of batches so far.
            step_arrays: Number of arrays in the largest step, if counted.
            live_arrays: Number of arrays held between steps.
            values: Makes the objective's metrics of their table.
        """
        self.trained_tokens += self.tokens
        seconds = max(self.step_seconds, 1e-9)
        layers = {path: asdict(layer) for path, layer in geometry.items()}
        report = StepReport(
            step=step,
            train_loss=self.loss / self.count if self.count else None,
            metrics=values(self.table) or None,
            learning_rate=float(learning_rate),
            tokens_per_second=self.tokens / seconds,
            steps_per_second=self.batches / seconds,
            skipped_steps=skipped or None,
            trained_tokens=self.trained_tokens,
            seconds=self.seconds,
            peak_memory_bytes=mx.get_peak_memory(),
            batch_shapes=batch_shapes,
            step_arrays=step_arrays,
            live_arrays=live_arrays,
            layers=layers if geometry and with_layers else None,
            kernels=None,  # added by the journal
            **summarise(geometry),
        )
        self._clear()
        return report

    def validation(
        self,
        step: int,
        loss: float,
        began: float,
        metrics: Mapping[str, float] | None = None,
    ) -> StepReport:
        """Report a validation that began when `seconds` was `began`."""
        return StepReport(
            step=step,
            val_loss=loss,
            metrics=dict(metrics) if metrics else None,
            trained_tokens=self.trained_tokens,
            seconds=self.seconds,
            val_seconds=self.seconds - began,
            peak_memory_bytes=mx.get_peak_memory(),
        )

    def _clear(self) -> None:
        self.loss, self.count, self.tokens = 0.0, 0, 0
        self.table: list[float] = []
        self.step_seconds, self.batches = 0.0, 0
