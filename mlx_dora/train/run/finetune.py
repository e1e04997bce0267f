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

    The adapter's files have mlx-lm's format and are replaced atomically, every
    ``save_every`` steps and at the end. ``best/`` holds the adapter with the lowest
    validation loss, and ``log.jsonl`` has one line per report. A checkpoint is written
    with each adapter, and ``resume`` continues from it. On the CPU, the same seed gives
    the same adapter bit for bit, whether or not the training was interrupted. At the
    end the model is in eval mode with the adapter attached; a variant has become the
    plain DoRA adapter that was written.

    Processes of an `mx.distributed` group share the rows of each batch. Only the first
    process reads and writes the adapter's folder. An error in any process ends all.

    Args:
        model: An mlx-lm model. Existing DoRA layers are trained further.
        tokenizer: Tokenizer of the model.
        train_set: Data from `load_datasets`, or a sequence of rows in mlx-lm's formats.
        valid_set: Validation data in the same form, or None.
        train: Settings of the training. Its data, test and adapter_path fields belong
            to the command line and are ignored here.
        dora: Settings of the adapter, also for LoRA. Full fine-tuning uses only its
            ``num_layers``.
        adapter_path: Folder for the adapter and the log; made at the first write.
        callback: Called with each report, in every process that passes a callback; or
            an mlx-lm callback (``mlx_lm.tuner.callbacks.TrainingCallback``).
        progress: Called after every step and during validations.
        loss: Returns the mean loss of a batch and its number of targets.
        batches: Makes an endless stream of batches from the data, batch size, maximum
            length, ``seed`` and ``counts``, instead of `Schedule`. `train` must then
            set iters, not epochs. For an exact resume, the batches must depend on these
            arguments only.

    Raises:
        DoRAError: If a setting, the data or the model is invalid (nothing is written),
            another training uses the folder, settings differ from those of the run to
            resume, or too many consecutive losses are not finite. In a group of
            processes, each raises a `SharedError`.
        OSError: If the folder is not writable, or its disk is full.
        KeyboardInterrupt: After Ctrl-C, once the step is done and the adapter is saved;
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
        first_step = run.step
        _describe_start(run)
        interrupted = loop(run)
    if interrupted:
        logger.warning(
            "stopped after step %d; %s",
            run.step,
            f"the adapter is in {run.folder}" if run.step else "nothing is saved",
        )
        raise interruption(interrupted)
    return _report(run, first_step)


def _describe_start(run: Run) -> None:
    """Log what will be trained."""
    from mlx_lm.utils import get_total_parameters

    if not run.is_writer:
        return
    trained = sum(value.size for value in trainable_tensors(run.model).values())
    total = get_total_parameters(run.model) or 1
    logger.info(
        "Trainable: %s of %s parameters (%.3g %%) in %d modules",
        f"{trained:,}",
        f"{total:,}",
        100 * trained / total,
        len(run.modules),
    )


def _report(run: Run, first_step: int) -> TrainReport:
    trained = sum(value.size for value in trainable_tensors(run.model).values())
    export_variants(run.model)
    return TrainReport(
        adapter_path=run.folder,
        first_step=first_step,
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
