"""Checks everything that can be wrong with a training, before a file is written."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import BaseModel
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.data.batches import Examples
from mlx_dora.data.documents import check_packable
from mlx_dora.data.loading import as_dataset
from mlx_dora.evaluate.loss import Loss
from mlx_dora.progress import Progress
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.group import check_alike, together
from mlx_dora.train.optimizers import describe_training, describe_variant
from mlx_dora.train.run.feed import Feed, MakeBatches
from mlx_dora.train.run.guard import Best, Guard
from mlx_dora.train.run.journal import Journal, StepReport
from mlx_dora.train.run.meter import Meter
from mlx_dora.train.run.run import Run
from mlx_dora.train.run.settings import run_settings
from mlx_dora.train.run.start import check_folder, check_lora_plus, make_trainable
from mlx_dora.train.services import (
    HostCallback,
    check_services,
    listener_of,
    service_listener,
)
from mlx_dora.train.steppers import stepper_class


def prepare(
    model: nn.Module,
    tokenizer: Any,
    train_set: Any,
    valid_set: Any,
    *,
    train: TrainConfig,
    dora: DoRAConfig,
    folder: Path,
    callback: Callable[[StepReport], None] | HostCallback | None,
    progress: Progress | None,
    loss: Loss,
    batches: MakeBatches | None,
) -> Run:
    """Make the model trainable and put the parts of a run together.

    The arguments are those of `mlx_dora.train.finetune`.

    Raises:
        DoRAError: If a setting, the data or the model is unfit; of several processes
            each raises a `SharedError`.
    """
    group = mx.distributed.init()
    with together(group):
        if group.rank() == 0:
            check_folder(folder, train)
            check_services(train)
        data = as_dataset(train_set, tokenizer, train, "the training data")
        valid_data = _validation_data(valid_set, tokenizer, train)
        kind = stepper_class(dora.variant)
        feed = Feed(kind.levels(data, train), train, batches)
        if train.epochs is not None:
            train = replace(train, iters=feed.length(train.epochs))
        epoch_ends = None
        if train.epochs_per_eval is not None:
            epoch_ends = feed.epoch_ends(train.epochs_per_eval, train.iters)
        optimizer = kind.make_optimizer(train)
        base = BaseModel(model=train.model, fingerprint=fingerprint(model))
        settings = run_settings(train, dora, str(base.fingerprint), data, group.size())
        mx.random.seed(train.seed)
        modules = make_trainable(model, dora, train.fine_tune_type)
        check_lora_plus(model, train.lora_plus_ratio)
        if train.packing:
            check_packable(model)
        optimizer.init(model.trainable_parameters())
    check_alike({**settings, "iters": train.iters, "epochs": train.epochs}, group)
    summary = {**describe_training(train), **describe_variant(dora, train)}
    return Run(
        model=model,
        train=train,
        folder=folder,
        group=group,
        loss=loss,
        feed=feed,
        valid_data=valid_data,
        epoch_ends=epoch_ends,
        optimizer=optimizer,
        base=base,
        settings=settings,
        summary=summary,
        modules=tuple(modules),
        journal=_journal(train, folder, group, callback, summary),
        guard=Guard(train.max_bad_steps),
        best=Best(patience=train.early_stop),
        meter=Meter(),
        progress=progress,
        make_stepper=partial(
            kind,
            model,
            optimizer,
            loss=loss,
            group=group,
            settings=train,
        ),
    )


def _validation_data(
    valid_set: Any, tokenizer: Any, train: TrainConfig
) -> Examples | None:
    if valid_set is None or not len(valid_set) or not train.val_batches:
        return None
    return as_dataset(valid_set, tokenizer, train, "the validation data")


def _journal(
    train: TrainConfig,
    folder: Path,
    group: mx.distributed.Group,
    callback: Callable[[StepReport], None] | HostCallback | None,
    summary: dict[str, Any],
) -> Journal:
    is_writer = group.rank() == 0
    listeners = [] if callback is None else [listener_of(callback)]
    if train.services and is_writer:
        listeners.append(service_listener(train, folder, summary))
    return Journal(folder if is_writer else None, listeners)
