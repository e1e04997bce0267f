"""Fine-tune a model: prepare the run, resume it, loop."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.surgery import export_variants
from mlx_dora.data.batches import Batch
from mlx_dora.evaluate.loss import Loss, loss_fn
from mlx_dora.progress import Progress
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.run.interrupt import interruption
from mlx_dora.train.run.journal import StepReport, TrainReport
from mlx_dora.train.run.lock import training_lock
from mlx_dora.train.run.loop import loop
from mlx_dora.train.run.prepare import prepare
from mlx_dora.train.run.resume import resume
from mlx_dora.train.run.run import Run
from mlx_dora.train.run.start import trainable_tensors
from mlx_dora.train.services import HostCallback

logger = logging.getLogger(__name__)


def finetune(
    model: nn.Module,
    tokenizer: Any,
    train_set: Any,
    valid_set: Any,
    *,
    train: TrainConfig,
    dora: DoRAConfig,
    adapter_path: str | Path,
    callback: Callable[[StepReport], None] | HostCallback | None = None,
    progress: Progress | None = None,
    loss: Loss = loss_fn,
    batches: Callable[..., Iterator[Batch]] | None = None,
) -> TrainReport:
    """Fine-tune a model in place and write its adapter.

    The adapter's files are in mlx-lm's format and replaced whole, at every
    ``save_every`` steps and at the end; ``best/`` holds the adapter of the least
    validation loss, and ``log.jsonl`` has one line a report. With the adapter a
    checkpoint is written, from which ``resume`` continues. The same seed gives the same
    adapter, bit for bit, on the CPU, whether the training was stopped in between or
    not. Afterwards the model is in eval mode, with the adapter in it; a variant has
    become the plain DoRA adapter that was written.

    Processes of one `mx.distributed` group share the rows of each batch. The first
    alone reads and writes the adapter's folder; an error in one ends all.

    Args:
        model: A model of mlx-lm's. DoRA layers that it already has are trained further.
        tokenizer: Its tokenizer.
        train_set: Data from `load_datasets`, or a sequence of rows in mlx-lm's formats.
        valid_set: The same for validation, or None.
        train: Settings of the training. Its data, test and adapter_path fields belong
            to the command line and are ignored here.
        dora: Which modules are adapted and how; for LoRA too, and its ``num_layers``
            for full fine-tuning.
        adapter_path: Folder for the adapter and the log; made at the first write.
        callback: Called with each report, in every process that has one; or an object
            of mlx-lm's kind (``mlx_lm.tuner.callbacks.TrainingCallback``).
        progress: Called after every step and during validations.
        loss: Loss and number of targets of a batch.
        batches: Makes batches without end from the data, batch size, maximum length,
            ``seed`` and ``counts``, in place of `Schedule`; `train` must name iters
            then, not epochs. To be resumed exactly they must depend on these alone.

    Raises:
        DoRAError: If a setting, the data or the model is unfit (nothing is written
            then), another training uses the folder, ``resume`` meets other settings, or
            too many losses in a row are not finite. Of several processes each raises a
            `SharedError`.
        OSError: If the folder cannot be written to, or its disk is full.
        KeyboardInterrupt: After Ctrl-C, when the step is done and the adapter saved; a
            `Stopped` after SIGTERM or SIGHUP.
    """
    run = prepare(
        model,
        tokenizer,
        train_set,
        valid_set,
        train=train,
        dora=dora,
        folder=Path(adapter_path).expanduser(),
        callback=callback,
        progress=progress,
        loss=loss,
        batches=batches,
    )
    with ExitStack() as stack:
        with run.together():
            if run.is_writer:
                stack.enter_context(training_lock(run.folder))
        resume(run)
        interrupted = loop(run)
    if interrupted:
        logger.warning(
            "stopped after step %d; the adapter is in %s", run.step, run.folder
        )
        raise interruption(interrupted)
    return _report(run)


def _report(run: Run) -> TrainReport:
    trained = sum(value.size for value in trainable_tensors(run.model).values())
    export_variants(run.model)
    return TrainReport(
        adapter_path=run.folder,
        steps=run.step,
        modules=run.modules,
        trainable_parameters=trained,
        train_loss=run.journal.last("train_loss"),
        first_val_loss=run.journal.first("val_loss"),
        val_loss=run.journal.last("val_loss"),
        best_step=run.best.step,
        steps_skipped=run.guard.empty + run.guard.not_finite,
        trained_tokens=run.meter.trained_tokens,
        seconds=run.meter.seconds,
        peak_memory_bytes=mx.get_peak_memory(),
        rows_truncated=run.feed.counts.truncated,
        rows_skipped=run.feed.counts.skipped,
        history=tuple(run.journal.history),
    )
