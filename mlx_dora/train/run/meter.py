"""Adds up losses, tokens and time between two reports."""

import time
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_dora.train.geometry import LayerGeometry, by_layer, summarise
from mlx_dora.train.run.journal import StepReport


class Meter:
    """Sums of the steps since the last report, and of the whole training."""

    def __init__(self) -> None:
        self.trained_tokens = 0
        self._earlier = 0.0
        self._began = self._last = time.perf_counter()
        mx.reset_peak_memory()
        self._clear()

    @property
    def seconds(self) -> float:
        """Time since the training began; after a resume, without the pause."""
        return self._earlier + time.perf_counter() - self._began

    def start_step(self) -> None:
        """Start the clock of a step."""
        self._last = time.perf_counter()

    def end_step(self, batches: int) -> None:
        """Stop the clock; the step is evaluated."""
        self._step_seconds += time.perf_counter() - self._last
        self._batches += batches

    def add(self, loss: float, tokens: int) -> None:
        """Add the losses of one step.

        Args:
            loss: Sum over its target tokens.
            tokens: Their number.
        """
        self._loss += loss
        self._tokens += tokens

    def report(
        self,
        step: int,
        learning_rate: mx.array,
        geometry: Mapping[str, LayerGeometry],
        *,
        with_layers: bool = False,
        skipped: int = 0,
    ) -> StepReport:
        """Make a report of the steps since the last one, and begin anew.

        Args:
            step: Batches done.
            learning_rate: At this step.
            geometry: Of the DoRA layers, now.
            with_layers: Keep it by layer too.
            skipped: Steps that were passed over so far.
        """
        self.trained_tokens += self._tokens
        seconds = max(self._step_seconds, 1e-9)
        report = StepReport(
            step=step,
            train_loss=self._loss / self._tokens if self._tokens else None,
            learning_rate=float(learning_rate),
            tokens_per_second=self._tokens / seconds,
            steps_per_second=self._batches / seconds,
            skipped_steps=skipped or None,
            trained_tokens=self.trained_tokens,
            seconds=self.seconds,
            peak_memory_bytes=mx.get_peak_memory(),
            layers=by_layer(geometry) if geometry and with_layers else None,
            **summarise(geometry),
        )
        self._clear()
        return report

    def validation(self, step: int, loss: float, began: float) -> StepReport:
        """Make a report of a validation; `began` is what `seconds` was before it."""
        return StepReport(
            step=step,
            val_loss=loss,
            trained_tokens=self.trained_tokens,
            seconds=self.seconds,
            val_seconds=self.seconds - began,
            peak_memory_bytes=mx.get_peak_memory(),
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "loss": self._loss,
            "tokens": self._tokens,
            "batches": self._batches,
            "step_seconds": self._step_seconds,
            "trained_tokens": self.trained_tokens,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._loss, self._tokens = state["loss"], state["tokens"]
        self._batches, self._step_seconds = state["batches"], state["step_seconds"]
        self.trained_tokens, self._earlier = state["trained_tokens"], state["seconds"]

    def _clear(self) -> None:
        self._loss, self._tokens = 0.0, 0
        self._step_seconds, self._batches = 0.0, 0
