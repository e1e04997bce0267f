"""The training loop, on one page.

What one update does is in `update`, what a stopped run needs in `checkpoint` and
`resume`.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import BaseModel
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import write_adapter_files
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.adapters.surgery import export_variants
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.batches import Batch, RowCounts
from mlx_dora.evaluate.data import as_dataset
from mlx_dora.evaluate.documents import check_packable
from mlx_dora.evaluate.loss import Loss, evaluate_loss, loss_fn
from mlx_dora.evaluate.schedule import Schedule
from mlx_dora.train.bilevel import BilevelStepper, bilevel_optimizer, split_rows
from mlx_dora.train.checkpoint import (
    discard_checkpoints,
    discard_fragments,
    newest_checkpoint,
    write_checkpoint,
)
from mlx_dora.train.checkpointing import checkpointed_blocks
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.geometry import measure_geometry
from mlx_dora.train.group import agree, check_alike, share, together
from mlx_dora.train.guard import Best, Guard
from mlx_dora.train.interrupt import delayed_interrupt
from mlx_dora.train.lock import training_lock
from mlx_dora.train.memory import trim_cache, wired_memory
from mlx_dora.train.meter import Meter
from mlx_dora.train.optimizers import (
    build_optimizer,
    describe_training,
    describe_variant,
)
from mlx_dora.train.ranks import reallocate
from mlx_dora.train.reports import Journal, StepReport, TrainReport
from mlx_dora.train.resume import (
    check_settings,
    optimizer_tensors,
    restore,
    run_settings,
    share_start,
)
from mlx_dora.train.services import check_services, service_listener
from mlx_dora.train.start import (
    check_folder,
    check_lora_plus,
    kept_tensors,
    load_weights,
    make_trainable,
    train_mode,
    trainable_tensors,
)
from mlx_dora.train.state import TrainState
from mlx_dora.train.update import Stepper, seed_step

logger = logging.getLogger(__name__)

BEST_NAME = "best"

Progress = Callable[[str, int, int], None]
"""("train" or "validate", total, newly done): steps, or rows of a validation."""


def finetune(
    model: nn.Module,
    tokenizer: Any,
    train_set: Any,
    valid_set: Any,
    *,
    train: TrainConfig,
    dora: DoRAConfig,
    adapter_path: str | Path,
    callback: Callable[[StepReport], None] | None = None,
    progress: Progress | None = None,
    loss: Loss = loss_fn,
    batches: Callable[..., Iterator[Batch]] | None = None,
) -> TrainReport:
    """Fine-tune a model in place and write its adapter.

    The adapter's files are in mlx-lm's format and replaced whole, at every
    ``save_every`` steps and at the end, ``best/`` holds the adapter of the least
    validation loss, and ``log.jsonl`` has one line a report. With the adapter a
    checkpoint is written, from which ``resume`` goes on. The same seed gives the same
    adapter, bit for bit, on the CPU, whether the training was stopped in between or
    not. Afterwards the model is in eval mode, with the adapter in it, of a variant the
    plain DoRA adapter that was written.

    Processes of one `mx.distributed` group share the rows of each batch. The first
    alone reads and writes the adapter's folder; an error in one ends all.

    Args:
        model: A model of mlx-lm's. DoRA layers that it has already are trained on.
        tokenizer: Its tokenizer.
        train_set: Data from `load_datasets`, or a sequence of rows in mlx-lm's formats.
        valid_set: The same for validation, or None.
        train: Settings of the training. Its data, test and adapter_path fields are the
            command line's and not looked at.
        dora: Which modules are adapted and how; for LoRA too, and its ``num_layers``
            for full fine-tuning.
        adapter_path: Folder for the adapter and the log; made when first written to.
        callback: Called with each report, in every process that has one.
        progress: Called after every step and during validations.
        loss: Loss and number of targets of a batch.
        batches: Makes batches without end from the data, batch size, maximum length,
            ``seed`` and ``counts``, in place of `Schedule`; `train` must name iters
            then, not epochs. To be resumed exactly they must depend on these alone.

    Raises:
        DoRAError: If a setting, the data or the model is unfit (nothing is written
            then), another training goes on in the folder, ``resume`` finds other
            settings, or too many losses in a row are not finite. Of several processes
            each raises a `SharedError`.
        OSError: If the folder cannot be written to, or its disk is full.
        KeyboardInterrupt: After Ctrl-C, when the step is done and the adapter saved.
    """
    # 1. Everything that can be wrong is found here, before a file is written.
    folder = Path(adapter_path).expanduser()
    group = mx.distributed.init()
    is_writer = group.rank() == 0
    with together(group):
        if is_writer:
            check_folder(folder, train)
            check_services(train)
        data = as_dataset(train_set, tokenizer, train, "the training data")
        valid_data = None
        if valid_set is not None and len(valid_set) and train.val_batches:
            valid_data = as_dataset(valid_set, tokenizer, train, "the validation data")
        counts = RowCounts()
        limits = train.batch_size, train.max_seq_length
        levels = split_rows(data, train) if dora.variant == "bidora" else [data]
        schedules, epochs_end = [], None
        if batches is None:
            schedules = [
                Schedule(
                    rows, *limits, seed=train.seed, packing=train.packing, counts=counts
                )
                for rows in levels
            ]
            if train.epochs is not None:
                train = replace(train, iters=schedules[0].length(train.epochs))
            if train.epochs_per_eval is not None:
                epochs_end = schedules[0].ends(train.epochs_per_eval, train.iters)
        elif train.epochs or train.epochs_per_eval:
            raise DoRAError("epochs are those of the training's own batches.")
        optimizer = (build_optimizer if len(levels) == 1 else bilevel_optimizer)(train)
        base = BaseModel(model=train.model, fingerprint=fingerprint(model))
        settings = run_settings(train, dora, str(base.fingerprint), data, group.size())
        mx.random.seed(train.seed)
        modules = make_trainable(model, dora, train.fine_tune_type)
        check_lora_plus(model, train.lora_plus_ratio)
        if train.packing:
            check_packable(model)
        optimizer.init(model.trainable_parameters())
    check_alike({**settings, "iters": train.iters, "epochs": train.epochs}, group)

    with ExitStack() as stack:
        # 2. A run begins, or goes on where its newest checkpoint stands.
        k = train.grad_accumulation_steps
        summary = {**describe_training(train), **describe_variant(dora, train)}
        listeners = [callback] if callback else []
        if train.services and is_writer:
            listeners.append(service_listener(train, folder, summary))
        journal = Journal(folder if is_writer else None, listeners)
        found = None
        with together(group):
            if is_writer:
                stack.enter_context(training_lock(folder))
                discard_fragments(folder)
                if train.resume:
                    found = newest_checkpoint(folder, multiple_of=k)
            if found is not None:
                check_settings(found, settings, force=train.force)
                restore(found, model, optimizer)
                journal.restore(folder, found.state.log_bytes)
                logger.info("going on from %s", found.path)
            elif is_writer and train.resume_adapter_file is not None:
                load_weights(model, train.resume_adapter_file)
            if is_writer and train.resume and found is None:
                logger.warning("%s has no checkpoint: the training begins anew", folder)
        share_start(model, optimizer, group)
        state = share(None if found is None else asdict(found.state), group)
        past = share([asdict(report) for report in journal.history], group)
        journal.history = [StepReport(**report) for report in past]
        step = state["step"] if state else 0
        with together(group):
            if batches is None:
                place = step, group.rank(), group.size()
                sources = [one.batches(*place) for one in schedules]
            else:
                make = partial(batches, seed=train.seed, counts=counts)
                sources = [islice(make(one, *limits), step, None) for one in levels]
            source, *held_out = [chain([next(one)], one) for one in sources]
        make_stepper = partial(
            Stepper,
            model,
            loss=loss,
            group=group,
            max_grad_norm=train.max_grad_norm,
            lora_plus_ratio=train.lora_plus_ratio,
        )
        if held_out:
            stepper = BilevelStepper(model, make_stepper, optimizer, held_out[0])
        else:
            stepper = make_stepper(optimizer)

        # 3. What happens between updates.
        meter, guard = Meter(), Guard(train.max_bad_steps)
        best = Best(patience=train.early_stop)
        if state:
            meter.restore(state["meter"])
            guard.restore(state["guard"])
            best.restore(state["best"])
        elif is_writer:
            discard_checkpoints(folder)

        def report(step: int, *, saves: bool) -> None:
            found = meter.report(
                step,
                optimizer.learning_rate,
                measure_geometry(model),
                with_layers=saves,
                skipped=guard.empty + guard.not_finite,
            )
            with together(group):
                journal.add(found)

        def validate(step: int) -> None:
            if valid_data is None or journal.has("val_loss", step):
                return
            rows = len(valid_data)
            if train.val_batches != -1:
                rows = min(rows, train.val_batches * train.batch_size)
            result = evaluate_loss(
                model,
                valid_data,
                batch_size=train.batch_size,
                max_seq_length=train.max_seq_length,
                num_batches=train.val_batches,
                loss=loss,
                progress=None
                if progress is None
                else partial(progress, "validate", rows),
                group=group,
            )
            with together(group):
                journal.add(meter.validation(step, result.loss))
            if best.take(step, result.loss) and step:
                write(folder / BEST_NAME, step)

        def write(place: Path, step: int, *, warn: bool = False) -> None:
            losses = {name: journal.last(name) for name in ("train_loss", "val_loss")}
            with together(group):
                if is_writer:
                    write_adapter_files(
                        model,
                        place,
                        fine_tune_type=train.fine_tune_type,
                        base=base,
                        training={**summary, "steps": step, **losses},
                        warn=warn,
                    )

        def checkpoint(step: int) -> None:
            if step % k:  # a longer run has no update that ends here
                return
            state = TrainState(
                step=step,
                log_bytes=journal.position(),
                meter=meter.state(),
                guard=guard.state(),
                best=best.state(),
                settings=settings,
            )
            weights, moments = kept_tensors(model), optimizer_tensors(optimizer)
            with together(group):
                if is_writer:
                    keep = train.keep_last
                    write_checkpoint(folder, state, weights, moments, keep=keep)

        # 4. The loop.
        stack.enter_context(wired_memory())
        stack.enter_context(train_mode(model))
        stack.enter_context(checkpointed_blocks(model, train.grad_checkpoint))
        stopped = stack.enter_context(delayed_interrupt())
        if progress is not None and step:
            progress("train", train.iters, min(step, train.iters))
        if step == 0:
            validate(step)
        interrupted = False
        while step < train.iters and not (interrupted or best.is_enough):
            window = list(islice(source, min(k, train.iters - step)))
            meter.start_step()
            seed_step(train.seed, step, group.rank())
            before, step = step, step + len(window)
            gradient = stepper.gradient(window)
            with together(group):
                passes = guard.passes(
                    step, gradient.loss, gradient.norm, gradient.tokens
                )
            if passes:
                stepper.apply(gradient)
                if step < (train.rank_rounds + 1) * train.rank_every and is_due(
                    train.rank_every, before, step
                ):
                    reallocate(model, gradient.total)
                meter.add(gradient.loss, gradient.tokens)
            meter.end_step(len(window))
            trim_cache(train.clear_cache_threshold)
            if progress is not None:
                progress("train", train.iters, len(window))
            # Only what a longer run would report here too stands in a checkpoint.
            saves = is_due(train.save_every, before, step)
            if saves or is_due(train.steps_per_report, before, step):
                report(step, saves=saves)
            if epochs_end is None:
                evaluates = is_due(train.steps_per_eval, before, step)
            else:
                evaluates = any(before < end <= step for end in epochs_end)
            if evaluates:
                validate(step)
            interrupted = agree(stopped(), group)
            if saves or interrupted or best.is_enough or step >= train.iters:
                checkpoint(step)
            if saves:
                write(folder, step)
        if not journal.has("learning_rate", step):
            report(step, saves=True)
        if not interrupted:
            validate(step)
        write(folder, step, warn=True)
    if interrupted:
        logger.warning("stopped after step %d; the adapter is in %s", step, folder)
        raise KeyboardInterrupt
    trained = sum(value.size for value in trainable_tensors(model).values())
    export_variants(model)
    return TrainReport(
        adapter_path=folder,
        steps=step,
        modules=tuple(modules),
        trainable_parameters=trained,
        train_loss=journal.last("train_loss"),
        first_val_loss=journal.first("val_loss"),
        val_loss=journal.last("val_loss"),
        best_step=best.step,
        steps_skipped=guard.empty + guard.not_finite,
        trained_tokens=meter.trained_tokens,
        seconds=meter.seconds,
        peak_memory_bytes=mx.get_peak_memory(),
        rows_truncated=counts.truncated,
        rows_skipped=counts.skipped,
        history=tuple(journal.history),
    )


def is_due(every: int, before: int, step: int) -> bool:
    """Whether a multiple of `every` lies after `before` and not after `step`."""
    return step // every > before // every
