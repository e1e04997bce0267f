"""A training run: its parts, and its actions between updates."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_dora.adapters.adapter import BaseModel
from mlx_dora.adapters.files import write_adapter_files
from mlx_dora.data.batches import Batch, Examples
from mlx_dora.layers import has_divided, held_norms
from mlx_dora.progress import Progress
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.geometry import measure_geometry
from mlx_dora.train.group import together
from mlx_dora.train.objectives.objective import Measured, Objective
from mlx_dora.train.run.checkpoint import TrainState, write_checkpoint
from mlx_dora.train.run.feed import Feed
from mlx_dora.train.run.guard import Best, Guard
from mlx_dora.train.run.journal import Journal
from mlx_dora.train.run.memory_watch import MemoryWatch, count_live
from mlx_dora.train.run.meter import Meter
from mlx_dora.train.run.restore import optimizer_tensors
from mlx_dora.train.run.start import BEST_NAME, kept_tensors
from mlx_dora.train.stepper import Stepper


def measure(
    objective: Objective,
    model: nn.Module,
    data: Examples,
    train: TrainConfig,
    phase: Literal["validate", "test"],
    progress: Progress | None,
    group: mx.distributed.Group,
) -> Measured:
    """Measure the objective on validation or test data, in batches as in training.

    The arguments are those of `Run`; `phase` names the data.
    """
    count = train.val_batches if phase == "validate" else train.test_batches
    most = count * train.batch_size * (objective.unit or 1)
    rows = len(data) if count == -1 else min(len(data), most)
    return objective.measure(
        model,
        data,
        train=train,
        num_batches=count,
        progress=progress and partial(progress, phase, rows),
        group=group,
    )


class _ValidationStopped(Exception):
    """Leaves a validation that an interrupt makes useless."""


@dataclass(kw_only=True)
class Run:
    """The state of a training, after all checks; `step` is its position.

    Args:
        model: The model, made trainable.
        train: Settings of the training, with ``iters`` set.
        folder: Folder of the adapter, the log and the checkpoints.
        group: The processes of the training. Only the first writes files.
        rows: The processes that share the rows of each batch.
        objective: What the training minimizes.
        feed: The training batches.
        valid_data: Validation examples; None for no validation.
        watch: Stops the training before memory ends.
        epoch_ends: Steps after which to validate; None to use ``steps_per_eval``.
        optimizer: The optimizer, initialized for the model.
        base: Description of the base model that the adapter records.
        settings: Settings that must be unchanged when the run is resumed.
        summary: Settings that the adapter records.
        modules: Paths of the trained modules.
        make_stepper: Makes the stepper from the batches of the levels after the first.
        progress: Called after every step and during validations; may be None.
        step: Number of batches done.
        kernels: What the ops use, `Decisions` as a dict: as the checkpoint recorded it
            until `finetune` decides.
        meter: Sums since the last report.
        guard: Skips steps that are not finite.
        best: The best validation so far.
        journal: Records the reports. Set by `finetune`.
        stepper: Updates the weights. Set by `resume`.
        source: The batches from `step` on. Set by `resume`.
    """

    model: nn.Module
    train: TrainConfig
    folder: Path
    group: mx.distributed.Group
    rows: mx.distributed.Group
    objective: Objective
    feed: Feed
    valid_data: Examples | None
    watch: MemoryWatch
    epoch_ends: Sequence[int] | None
    optimizer: optim.Optimizer
    base: BaseModel
    settings: dict[str, Any]
    summary: dict[str, Any]
    modules: tuple[str, ...]
    make_stepper: Callable[[Sequence[Iterator[Batch]]], Stepper]
    progress: Progress | None = None
    step: int = 0
    kernels: dict[str, Any] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    guard: Guard = field(init=False)
    best: Best = field(init=False)
    journal: Journal = field(init=False)
    stepper: Stepper = field(init=False)
    source: Iterator[Batch] = field(init=False)

    def __post_init__(self) -> None:
        self.guard = Guard(self.train.max_bad_steps)
        self.best = Best(patience=self.train.early_stop)

    @property
    def is_writer(self) -> bool:
        """Whether this process reads and writes the adapter's folder."""
        return self.group.rank() == 0

    @property
    def block(self) -> int:
        """Number of batches between steps that can be resumed from."""
        return self.train.grad_accumulation_steps * self.objective.passes

    def together(self) -> AbstractContextManager[None]:
        """A block that every process completes, or none."""
        return together(self.group)

    def exchanged_norms(self) -> AbstractContextManager[None]:
        """A block in which no norm needs another process, where weights are divided."""
        is_sharded = self.group.size() > 1 and has_divided(self.model)
        return held_norms(self.model) if is_sharded else nullcontext()

    def report(self, *, with_layers: bool) -> None:
        """Report the steps since the last report."""
        with self.exchanged_norms():
            geometry = measure_geometry(self.model)
        entry = self.meter.report(
            self.step,
            self.optimizer.learning_rate,
            geometry,
            with_layers=with_layers,
            skipped=self.guard.empty + self.guard.not_finite,
            batch_shapes=len(self.watch.shapes),
            step_arrays=self.watch.step_arrays,
            live_arrays=count_live(self.model.state, self.optimizer.state),
            values=self.objective.values,
        )
        with self.together():
            self.journal.add(entry)

    def validate(self, stopped: Callable[[], int] = lambda: 0) -> None:
        """Compute the validation loss once per step; save the adapter if it is best.

        Args:
            stopped: Whether to give up. In a group of processes, which must all make
                the same number of sums, it is not asked.
        """
        train, data = self.train, self.valid_data
        if data is None or self.journal.has("val_loss", self.step):
            return
        began = self.meter.seconds

        def advance(phase: str, total: int, done: int) -> None:
            if self.progress is not None:
                self.progress(phase, total, done)
            if self.group.size() == 1 and stopped():
                raise _ValidationStopped

        try:
            result = measure(
                self.objective, self.model, data, train, "validate", advance, self.rows
            )
        except _ValidationStopped:
            return
        with self.together():
            self.journal.add(
                self.meter.validation(self.step, result.loss, began, result.metrics)
            )
        if self.best.take(self.step, self.objective.score(result)) and self.step:
            self.save(self.folder / BEST_NAME)

    def save(self, folder: Path, *, warn: bool = False) -> None:
        """Write the adapter's files.

        Args:
            folder: Folder to write to.
            warn: Whether to warn of parts that mlx-lm itself cannot load.
        """
        losses = {name: self.journal.last(name) for name in ("train_loss", "val_loss")}
        # The writer's check of the norms must not wait for other processes.
        with self.exchanged_norms(), self.together():
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
        """Write a checkpoint, unless the step lies inside an update or a sampling.

        A longer run would not make the shortened last update, so it could not resume
        from such a step.
        """
        if self.step % self.block:
            return
        state = TrainState(
            step=self.step,
            log_bytes=self.journal.position(),
            meter=self.meter.state(),
            guard=self.guard.state(),
            best=self.best.state(),
            settings=self.settings,
            kernels=self.kernels,
            objective=self.objective.state(),
        )
        weights, moments = kept_tensors(self.model), optimizer_tensors(self.optimizer)
        with self.together():
            if self.is_writer:
                write_checkpoint(
                    self.folder, state, weights, moments, keep=self.train.keep_last
                )
