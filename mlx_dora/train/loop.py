"""The training loop, on one page.

Left out here, on purpose: exact resume, several machines, early stopping, gradient
clipping.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_dora.adapters.adapter import BaseModel
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import write_adapter_files
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.evaluate.batches import Batch, RowCounts
from mlx_dora.evaluate.data import as_dataset
from mlx_dora.evaluate.documents import check_packable
from mlx_dora.evaluate.loss import Loss, evaluate_loss, loss_fn
from mlx_dora.evaluate.schedule import Schedule
from mlx_dora.layers import held_norms
from mlx_dora.train.checkpointing import checkpointed_blocks
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.geometry import measure_geometry
from mlx_dora.train.interrupt import delayed_interrupt
from mlx_dora.train.memory import trim_cache, wired_memory
from mlx_dora.train.meter import Meter
from mlx_dora.train.optimizers import build_optimizer, describe_training
from mlx_dora.train.reports import Journal, StepReport, TrainReport
from mlx_dora.train.services import check_services, service_listener
from mlx_dora.train.start import (
    check_folder,
    load_weights,
    make_trainable,
    train_mode,
    trainable_tensors,
)

logger = logging.getLogger(__name__)

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
    ``save_every`` steps and at the end; ``log.jsonl`` beside them has one line a
    report. The same seed gives the same adapter, bit for bit, on the CPU. Afterwards
    the model is in eval mode, with the adapter in it.

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
        callback: Called with each report.
        progress: Called after every step and during validations.
        loss: Loss and number of targets of a batch.
        batches: Makes batches without end from the data, batch size, maximum length,
            ``seed`` and ``counts``, in place of `Schedule`; `train` must name iters
            then, not epochs.

    Raises:
        DoRAError: If a setting, the data or the model is unfit (nothing is written
            then), or the loss stops being finite.
        KeyboardInterrupt: After Ctrl-C, when the step is done and the adapter saved.
    """
    # 1. Everything that can be wrong is found here, before a file is written.
    folder = Path(adapter_path).expanduser()
    check_folder(folder, train)
    check_services(train)
    data = as_dataset(train_set, tokenizer, train, "the training data")
    valid_data = None
    if valid_set is not None and len(valid_set) and train.val_batches:
        valid_data = as_dataset(valid_set, tokenizer, train, "the validation data")
    optimizer = build_optimizer(train)
    base = BaseModel(model=train.model, fingerprint=fingerprint(model))
    mx.random.seed(train.seed)
    modules = make_trainable(model, dora, train.fine_tune_type)
    if train.resume_adapter_file is not None:
        load_weights(model, train.resume_adapter_file)
    if train.packing:
        check_packable(model)
    counts = RowCounts()
    limits = train.batch_size, train.max_seq_length
    if batches is None:
        schedule = Schedule(
            data, *limits, seed=train.seed, packing=train.packing, counts=counts
        )
        if train.epochs is not None:
            train = replace(train, iters=schedule.length(train.epochs))
        source = schedule.batches()
    else:
        source = batches(data, *limits, seed=train.seed, counts=counts)
    source = chain([next(source)], source)

    # 2. One update: gradients of a few batches, averaged over their tokens.
    optimizer.init(model.trainable_parameters())
    value_and_grad = nn.value_and_grad(model, loss)
    forward_state = [model.state, mx.random.state]
    update_state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=forward_state, outputs=forward_state)
    def differentiate(batch: mx.array, lengths: mx.array) -> tuple[Any, ...]:
        (value, tokens), gradient = value_and_grad(model, batch, lengths)
        return value * tokens, tokens, gradient

    def accumulate(total: Any, gradient: Any, tokens: mx.array) -> Any:
        new = tree_map(lambda g: g.astype(mx.float32) * tokens, gradient), tokens
        return new if total is None else tree_map(mx.add, total, new)

    @partial(mx.compile, inputs=update_state, outputs=update_state)
    def update(gradient: Any, tokens: mx.array) -> None:
        mean = tree_map(
            lambda g, weight: (g / mx.maximum(tokens, 1)).astype(weight.dtype),
            gradient,
            model.trainable_parameters(),
        )
        optimizer.update(model, mean)

    # 3. What happens between updates.
    settings = describe_training(train)
    listeners = [callback] if callback else []
    if train.services:
        listeners.append(service_listener(train, folder, settings))
    journal = Journal(folder, listeners)
    meter = Meter()

    def report(step: int, saves: bool) -> None:
        geometry = measure_geometry(model)
        journal.add(meter.report(step, optimizer.learning_rate, geometry, saves))

    def validate(step: int) -> None:
        if valid_data is None:
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
            progress=None if progress is None else partial(progress, "validate", rows),
        )
        journal.add(meter.validation(step, result.loss))

    def save(step: int) -> None:
        meter.check(step)
        losses = {name: journal.last(name) for name in ("train_loss", "val_loss")}
        write_adapter_files(
            model,
            folder,
            fine_tune_type=train.fine_tune_type,
            base=base,
            training={**settings, "steps": step, **losses},
            warn=step >= train.iters,
        )

    # 4. The loop.
    folder.mkdir(parents=True, exist_ok=True)
    step, stop, k = 0, False, train.grad_accumulation_steps
    with (
        wired_memory(),
        train_mode(model),
        checkpointed_blocks(model, train.grad_checkpoint),
        delayed_interrupt() as stopped,
    ):
        validate(step)
        while step < train.iters and not stop:
            window = list(islice(source, min(k, train.iters - step)))
            meter.start_step()
            with held_norms(model):  # they stay the same until the weights change
                total = None
                for batch, lengths in window:
                    value, tokens, gradient = differentiate(batch, lengths)
                    meter.add(value, tokens)
                    if len(window) == 1:  # a mean over its tokens already
                        total = gradient, mx.array(1)
                    else:
                        total = accumulate(total, gradient, tokens)
                        mx.eval(total, meter.sums)
            assert total is not None
            update(*total)
            mx.eval(model.state, optimizer.state, mx.random.state, meter.sums)
            meter.end_step(len(window))
            trim_cache(train.clear_cache_threshold)

            before, step, stop = step, step + len(window), stopped()
            is_last = stop or step >= train.iters
            if progress is not None:
                progress("train", train.iters, len(window))
            saves = is_last or is_due(train.save_every, before, step)
            if saves or is_due(train.steps_per_report, before, step):
                report(step, saves)
            if not stop and (is_last or is_due(train.steps_per_eval, before, step)):
                validate(step)
            if saves:
                save(step)
    if stop:
        logger.warning("stopped after step %d; the adapter is in %s", step, folder)
        raise KeyboardInterrupt
    return TrainReport(
        adapter_path=folder,
        steps=step,
        modules=tuple(modules),
        trainable_parameters=sum(v.size for v in trainable_tensors(model).values()),
        train_loss=journal.last("train_loss"),
        first_val_loss=journal.first("val_loss"),
        val_loss=journal.last("val_loss"),
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
