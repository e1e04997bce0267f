"""Fine-tune a model: prepare the run, resume it, loop."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import BaseModel
from mlx_dora.adapters.config import DoRAConfig, Variant
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.adapters.sharding import parameter_count
from mlx_dora.adapters.surgery import apply_layers, dora_layers, export_variants
from mlx_dora.data.batches import Batch, Examples
from mlx_dora.data.documents import check_packable, mask_bytes
from mlx_dora.data.loading import as_dataset
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import Loss, loss_fn
from mlx_dora.progress import Progress
from mlx_dora.train.bilevel import BilevelStepper
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.group import check_alike, row_group, together
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.metal import check_gradients
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.objectives.make import make_objective
from mlx_dora.train.objectives.objective import Objective, Surroundings
from mlx_dora.train.optimizers import describe_training, describe_variant
from mlx_dora.train.ranks import AdaptiveStepper
from mlx_dora.train.run.feed import Feed, MakeBatches
from mlx_dora.train.run.interrupt import interruption
from mlx_dora.train.run.journal import Journal, StepReport, TrainReport
from mlx_dora.train.run.kernels import decide_kernels
from mlx_dora.train.run.lock import training_lock
from mlx_dora.train.run.loop import loop
from mlx_dora.train.run.memory_watch import watch_memory
from mlx_dora.train.run.resume import resume
from mlx_dora.train.run.run import Run
from mlx_dora.train.run.settings import run_settings
from mlx_dora.train.run.start import (
    check_folder,
    check_lora_plus,
    check_present,
    trainable_tensors,
)
from mlx_dora.train.run.view import watched
from mlx_dora.train.services import (
    HostCallback,
    check_services,
    listener_of,
    service_listener,
)
from mlx_dora.train.sharded import check_shardable, divide
from mlx_dora.train.stepper import Stepper

logger = logging.getLogger(__name__)

_STEPPERS: dict[Variant, type[Stepper]] = {
    "adaptive": AdaptiveStepper,
    "bidora": BilevelStepper,
}
"""Steppers of the variants whose updates differ from plain DoRA's."""


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
    preference: PreferenceConfig | None = None,
    reward: RewardConfig | None = None,
    objective: Objective | None = None,
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
            an mlx-lm callback (``mlx_lm.tuner.callbacks.TrainingCallback``). If None,
            a notebook shows a live table below the cell (unless `progress` is given),
            and elsewhere the reports are logged at level info.
        progress: Called after every step and during validations.
        loss: Of supervised fine-tuning: returns the mean loss of a batch and its number
            of targets.
        batches: Makes an endless stream of batches from the data, batch size, maximum
            length, ``seed`` and ``counts``, instead of `Schedule`. `train` must then
            set iters, not epochs. For an exact resume, the batches must depend on these
            arguments only.
        preference: Settings of the objectives dpo, orpo, kto and simpo.
        reward: Settings of the objective grpo.
        objective: What to minimize; default: made from ``train.objective`` and the
            settings of it.

    Raises:
        DoRAError: If a setting, the data or the model is invalid (nothing is written),
            another training uses the folder, settings differ from those of the run to
            resume, too many consecutive losses are not finite, or memory is about to
            end (a checkpoint is written). In a group of processes, each raises a
            `SharedError`.
        OSError: If the folder is not writable, or its disk is full.
        KeyboardInterrupt: After Ctrl-C, once the step is done and the adapter is saved;
            `Stopped` after SIGTERM or SIGHUP.
    """
    group, folder = mx.distributed.init(), Path(adapter_path).expanduser()
    with together(group):
        if objective is None:
            objective = make_objective(train, preference, loss, reward)
        objective.check(train, dora)
        if group.rank() == 0:
            check_folder(folder, train)
            check_services(train)

        def read(rows: Any, name: str) -> Any:
            made = as_dataset(rows, tokenizer, train, name, objective.dataset)
            objective.check_data(made, name)
            return objective.limited(made, train.max_seq_length)

        data, valid_data = read(train_set, "the training data"), None
        if valid_set is not None and len(valid_set) and train.val_batches:
            valid_data = read(valid_set, "the validation data")
    listeners = [] if callback is None else [listener_of(callback)]
    run = _prepare(model, train, dora, data, valid_data, folder, objective, batches)
    run.progress = progress
    if train.services and run.is_writer:
        listeners.append(service_listener(train, folder, run.summary))
    run.journal = Journal(folder if run.is_writer else None, listeners)
    with ExitStack() as stack:
        if callback is None and run.is_writer:
            listener, run.progress = stack.enter_context(watched(progress))
            listeners.append(listener)
        with run.together():
            if run.is_writer:
                stack.enter_context(training_lock(run.folder))
        objective.begin(
            Surroundings(
                model=model,
                train=run.train,
                folder=folder,
                group=group,
                base=str(run.base.fingerprint),
                train_set=data,
                valid_set=valid_data,
                tokenizer=tokenizer,
                progress=progress,
            )
        )
        resume(run)
        first_step = run.step
        _describe_start(run)
        decisions = decide_kernels(run)
        if asdict(decisions) != run.kernels and decisions.kernels != "reference":
            run.journal.note(asdict(decisions))
        run.kernels = asdict(decisions)
        with decisions.holding():
            interrupted = loop(run)
    if interrupted:
        logger.warning(
            "stopped after step %d; %s",
            run.step,
            f"the adapter is in {run.folder}" if run.step else "nothing is saved",
        )
        raise interruption(interrupted)
    return _report(run, first_step)


def _prepare(
    model: nn.Module,
    train: TrainConfig,
    dora: DoRAConfig,
    data: Examples,
    valid_data: Examples | None,
    folder: Path,
    objective: Objective,
    batches: MakeBatches | None,
) -> Run:
    """Make the model trainable and assemble a run."""
    group = mx.distributed.init()
    with together(group):
        check_shardable(train, dora, group)
    if train.shard:
        divide(model, group, train.shard)
    rows = row_group(group, train.shard)
    with together(group):
        kind = _STEPPERS.get(dora.variant, Stepper)
        feed = _feed(kind, train, data, objective, batches, rows.size())
        if train.epochs is not None:
            train = replace(train, iters=feed.length(train.epochs))
        epoch_ends = None
        if train.epochs_per_eval is not None:
            epoch_ends = feed.epoch_ends(train.epochs_per_eval, train.iters)
        optimizer = kind.make_optimizer(train)
        check_gradients(model)
        base = BaseModel(model=train.model, fingerprint=fingerprint(model))
        objective.adapting(model)
        mx.random.seed(train.seed)
        modules = _adapt(model, train, dora)
        check_lora_plus(model, train.lora_plus_ratio)
        _check_packing(model, train)
        optimizer.init(model.trainable_parameters())
        settings = run_settings(train, dora, str(base.fingerprint), data, group.size())
        settings |= objective.settings(data)
    watch = watch_memory(train, dora, data, objective)
    check_alike({**settings, "iters": train.iters, "epochs": train.epochs}, group)
    return Run(
        model=model,
        train=train,
        folder=folder,
        group=group,
        rows=rows,
        objective=objective,
        feed=feed,
        valid_data=valid_data,
        watch=watch,
        epoch_ends=epoch_ends,
        optimizer=optimizer,
        base=base,
        settings=settings,
        summary={
            **describe_training(train),
            **describe_variant(dora, train),
            **objective.summary(),
        },
        modules=tuple(modules),
        make_stepper=partial(
            kind,
            model,
            optimizer,
            loss=objective.loss,
            complete=None
            if objective.unit is None
            else partial(objective.completed, model, data),
            group=group,
            settings=train,
            noted=watch.count if watch.buffers else None,
        ),
    )


def _feed(
    stepper: type[Stepper],
    train: TrainConfig,
    data: Examples,
    objective: Objective,
    batches: MakeBatches | None,
    processes: int,
) -> Feed:
    """Return the source of a training's batches."""
    return Feed(
        stepper.levels(data, train),
        train,
        batches,
        processes,
        objective.unit,
        objective.passes,
        alike=train.shard is not None,
    )


def _check_packing(model: nn.Module, train: TrainConfig) -> None:
    """Refuse a model that cannot take packed rows; warn if it needs a mask for them."""
    if not train.packing:
        return
    check_packable(model)
    if size := mask_bytes(model, train.batch_size, train.max_seq_length):
        logger.warning(
            "packing: %s computes its own attention, which takes a mask of %d "
            "MB for %d rows of %d tokens, and scores of as many numbers for "
            "each head; batch_tokens needs no mask",
            type(model).__module__.rpartition(".")[2],
            -(-size // 10**6),
            train.batch_size,
            train.max_seq_length,
        )


def _adapt(model: nn.Module, train: TrainConfig, dora: DoRAConfig) -> list[str]:
    """Adapt the model, or use its existing DoRA layers; return what is trained."""
    is_dora = train.fine_tune_type == "dora"
    if not is_dora and not dora.is_plain:
        raise DoRAError(
            "variant, init and magnitude_keys apply to DoRA only; with fine_tune_type "
            f"{train.fine_tune_type} leave them out."
        )
    if is_dora and (present := dora_layers(model)):
        check_present(model, dora, present)
        return [path for path, _ in present]
    paths = apply_layers(model, dora, train.fine_tune_type)
    if not paths:
        raise DoRAError(
            f"nothing to train: num_layers is {dora.num_layers}, and no key names a "
            "module outside the blocks. Raise num_layers or add a key."
        )
    return paths


def _describe_start(run: Run) -> None:
    """Log what will be trained."""
    if not run.is_writer:
        return
    trained = sum(value.size for value in trainable_tensors(run.model).values())
    total = parameter_count(run.model) or 1
    logger.info(
        "Trainable: %s of %s parameters (%.3g %%) in %d modules",
        f"{trained:,}",
        f"{total:,}",
        100 * trained / total,
        len(run.modules),
    )
    if batches := run.feed.describe():
        logger.info("%s", batches)


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
