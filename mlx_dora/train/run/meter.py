"""Sums losses, tokens and time between reports."""

import time
from collections.abc import Mapping
from dataclasses import asdict

import mlx.core as mx

from mlx_dora.train.geometry import LayerGeometry, summarise
from mlx_dora.train.run.journal import StepReport
from mlx_dora.train.run.state import Saved


class Meter(Saved):
    """Sums over the steps since the last report, and over the whole training."""

    saved = ("loss", "tokens", "batches", "step_seconds", "trained_tokens", "seconds")

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

    def add(self, loss: float, tokens: int) -> None:
        """Add the loss of a step.

        Args:
            loss: Sum of the losses of the target tokens.
            tokens: Number of target tokens.
        """
        self.loss += loss
        self.tokens += tokens

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
        """
        self.trained_tokens += self.tokens
        seconds = max(self.step_seconds, 1e-9)
        layers = {path: asdict(layer) for path, layer in geometry.items()}
        report = StepReport(
            step=step,
            train_loss=self.loss / self.tokens if self.tokens else None,
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

    def validation(self, step: int, loss: float, began: float) -> StepReport:
        """Report a validation that began when `seconds` was `began`."""
        return StepReport(
            step=step,
            val_loss=loss,
            trained_tokens=self.trained_tokens,
            seconds=self.seconds,
            val_seconds=self.seconds - began,
            peak_memory_bytes=mx.get_peak_memory(),
        )

    def _clear(self) -> None:
        self.loss, self.tokens = 0.0, 0
        self.step_seconds, self.batches = 0.0, 0
