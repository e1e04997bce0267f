"""A training run: its parts, and what it does between updates."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_dora.adapters.adapter import BaseModel
from mlx_dora.adapters.files import write_adapter_files
from mlx_dora.data.batches import Batch, Examples
from mlx_dora.evaluate.loss import Loss, evaluate_loss
from mlx_dora.progress import Progress
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.geometry import measure_geometry
from mlx_dora.train.group import together
from mlx_dora.train.run.checkpoint import TrainState, write_checkpoint
from mlx_dora.train.run.feed import Feed
from mlx_dora.train.run.guard import Best, Guard
from mlx_dora.train.run.journal import Journal
from mlx_dora.train.run.meter import Meter
from mlx_dora.train.run.restore import optimizer_tensors
from mlx_dora.train.run.start import BEST_NAME, kept_tensors
from mlx_dora.train.stepper import Stepper


@dataclass(kw_only=True)
class Run:
    """Everything a training holds, checked; `step` says where it stands.

    Args:
        model: The model, made trainable.
        train: Settings, with ``iters`` known.
        folder: Folder of the adapter, the log and the checkpoints.
        group: The processes that share each batch. The first alone writes files.
        loss: Loss and number of targets of a batch.
        feed: The training batches.
        valid_data: Validation examples; None to leave validations out.
        epoch_ends: Steps after which to validate; None to count steps instead.
        optimizer: Initialised for the model.
        base: What the adapter records of the base model.
        settings: What must stay the same for the run to be resumed.
        summary: Settings that the adapter records.
        modules: Paths of the modules that are trained.
        journal: Takes the reports.
        guard: Passes over steps that are not finite.
        best: The best validation so far.
        meter: Sums since the last report.
        progress: Called after every step ("train") and during validations
            ("validate", of rows); may be None.
        make_stepper: Makes the stepper from the batches of its further levels.
        step: Batches done.
        stepper: Updates the weights. Set when the run is resumed or begins.
        source: The batches from `step` on. Set together with `stepper`.
    """

    model: nn.Module
    train: TrainConfig
    folder: Path
    group: mx.distributed.Group
    loss: Loss
    feed: Feed
    valid_data: Examples | None
    epoch_ends: Sequence[int] | None
    optimizer: optim.Optimizer
    base: BaseModel
    settings: dict[str, Any]
    summary: dict[str, Any]
    modules: tuple[str, ...]
    journal: Journal
    guard: Guard
    best: Best
    meter: Meter
    progress: Progress | None
    make_stepper: Callable[[Sequence[Iterator[Batch]]], Stepper]
    step: int = 0
    stepper: Stepper = field(init=False)
    source: Iterator[Batch] = field(init=False)

    @property
    def is_writer(self) -> bool:
        """Whether this process reads and writes the adapter's folder."""
        return self.group.rank() == 0

    def together(self) -> AbstractContextManager[None]:
        """A part of the work that every process completes, or none."""
        return together(self.group)

    def report(self, *, with_layers: bool) -> None:
        """Report the steps since the last report."""
        entry = self.meter.report(
            self.step,
            self.optimizer.learning_rate,
            measure_geometry(self.model),
            with_layers=with_layers,
            skipped=self.guard.empty + self.guard.not_finite,
        )
        with self.together():
            self.journal.add(entry)

    def validate(self) -> None:
        """Measure the validation loss, once a step; keep the adapter if it is best."""
        train, data = self.train, self.valid_data
        if data is None or self.journal.has("val_loss", self.step):
            return
        rows = len(data)
        if train.val_batches != -1:
            rows = min(rows, train.val_batches * train.batch_size)
        began = self.meter.seconds
        advance = self.progress and partial(self.progress, "validate", rows)
        result = evaluate_loss(
            self.model,
            data,
            batch_size=train.batch_size,
            max_seq_length=train.max_seq_length,
            num_batches=train.val_batches,
            loss=self.loss,
            progress=advance,
            group=self.group,
        )
        with self.together():
            self.journal.add(self.meter.validation(self.step, result.loss, began))
        if self.best.take(self.step, result.loss) and self.step:
            self.save(self.folder / BEST_NAME)

    def save(self, folder: Path, *, warn: bool = False) -> None:
        """Write the adapter's files.

        Args:
            folder: Where they go.
            warn: Name what stock mlx-lm cannot load of the adapter.
        """
        losses = {name: self.journal.last(name) for name in ("train_loss", "val_loss")}
        with self.together():
            if self.is_writer:
                write_adapter_files(
                    self.model,
                    folder,
                    fine_tune_type=self.train.fine_tune_type,
                    base=self.base,
                    training={**self.summary, "steps": self.step, **losses},
                    warn=warn,
                )

    def checkpoint(self) -> None:
        """Write a checkpoint, unless the step lies inside an update.

        An update that was cut short by the end of the run is not an update of a longer
        run, which therefore could not be resumed from there.
        """
        if self.step % self.train.grad_accumulation_steps:
            return
        state = TrainState(
            step=self.step,
            log_bytes=self.journal.position(),
            meter=self.meter.state(),
            guard=self.guard.state(),
            best=self.best.state(),
            settings=self.settings,
        )
        weights, moments = kept_tensors(self.model), optimizer_tensors(self.optimizer)
        with self.together():
            if self.is_writer:
                write_checkpoint(
                    self.folder, state, weights, moments, keep=self.train.keep_last
                )
