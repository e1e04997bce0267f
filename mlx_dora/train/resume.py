"""Going on from a checkpoint as if nothing had happened."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.data.batches import Examples
from mlx_dora.errors import DoRAError
from mlx_dora.train.checkpoint import Checkpoint
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.group import share_tensors
from mlx_dora.train.start import kept_tensors

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation: it changes neither the weights of
# a step nor a line of the log. Model and data are compared by what is in them.
FREE = {
    "model",
    "data",
    "hf_dataset",
    "train",
    "test",
    "test_batches",
    "iters",
    "epochs",
    "resume",
    "force",
    "overwrite",
    "resume_adapter_file",
    "adapter_path",
    "keep_last",
    "clear_cache_threshold",
    "report_to",
    "project_name",
    "trust_remote_code",
    "plan",
}


def run_settings(
    train: TrainConfig, dora: DoRAConfig, base: str, data: Examples, processes: int
) -> dict[str, Any]:
    """All that must be the same for a run to go on as it was, as JSON gives it back.

    Args:
        train: Settings of the training.
        dora: Settings of the adapter.
        base: Fingerprint of the base model.
        data: The training examples.
        processes: How many share a batch: it changes sums by rounding, and dropout.
    """
    kept = {
        field.name: getattr(train, field.name)
        for field in fields(train)
        if field.name not in FREE
    }
    found = {
        **kept,
        **{f"adapter.{name}": value for name, value in asdict(dora).items()},
        "base model": base,
        "training data": digest(data),
        "processes": processes,
        "mlx": version("mlx"),
    }
    return json.loads(json.dumps(found))


def digest(data: Examples) -> str:
    """Hash of every example's tokens and targets, in order."""
    total = hashlib.sha256()
    for index in range(len(data)):
        tokens, targets = data[index]
        total.update(np.array([len(tokens), *tokens], np.int64).tobytes())
        total.update(json.dumps(targets).encode())
    return f"sha256:{total.hexdigest()}"


def check_settings(
    checkpoint: Checkpoint, settings: dict[str, Any], *, force: bool
) -> None:
    """Refuse to go on with other settings than those of the checkpoint.

    Args:
        checkpoint: Where the run stands.
        settings: Those of now, from `run_settings`.
        force: Go on all the same, with a warning.

    Raises:
        DoRAError: Listing every difference.
    """
    before = checkpoint.state.settings
    differences = [
        f"{name} was {_short(before.get(name))}, is {_short(settings.get(name))}"
        for name in sorted({*before, *settings})
        if before.get(name) != settings.get(name)
    ]
    if not differences:
        return
    listed = "; ".join(differences)
    if not force:
        raise DoRAError(
            f"{checkpoint.path} is of another training: {listed}. Give the old "
            "settings, or force (--force) to go on with the new ones."
        )
    logger.warning("going on with other settings than before: %s", listed)


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: optim.Optimizer
) -> None:
    """Put a checkpoint's weights and optimizer state in place.

    Args:
        checkpoint: Where the run stands.
        model: Made trainable as it was then.
        optimizer: Initialised for the model.

    Raises:
        DoRAError: If names or shapes are not those of the model or the optimizer.
    """
    weights = kept_tensors(model)
    moments = optimizer_tensors(optimizer)
    for what, found, wanted in (
        ("weights", checkpoint.weights, weights),
        ("the optimizer's state", checkpoint.optimizer, moments),
    ):
        shapes = {name: value.shape for name, value in found.items()}
        if shapes != {name: value.shape for name, value in wanted.items()}:
            raise DoRAError(
                f"{checkpoint.path} does not fit the model: {what} have other names "
                "or shapes."
            )
    _put(model, optimizer, checkpoint.weights, checkpoint.optimizer)


def share_start(
    model: nn.Module, optimizer: optim.Optimizer, group: mx.distributed.Group
) -> None:
    """Give all processes the first one's weights and optimizer state.

    Args:
        model: Made trainable alike in all.
        optimizer: Initialised alike for the model, in the first perhaps restored.
        group: The processes.
    """
    if group.size() > 1:
        weights = share_tensors(kept_tensors(model), group)
        _put(
            model,
            optimizer,
            weights,
            share_tensors(optimizer_tensors(optimizer), group),
        )


def _put(
    model: nn.Module,
    optimizer: optim.Optimizer,
    weights: Mapping[str, mx.array],
    moments: Mapping[str, mx.array],
) -> None:
    model.load_weights(list(weights.items()), strict=False)
    optimizer.state = cast(
        dict,
        tree_map_with_path(
            lambda name, old: moments[name].astype(old.dtype), optimizer.state
        ),
    )
    mx.eval(model.trainable_parameters(), optimizer.state)


def optimizer_tensors(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimizer's state by name, its step and learning rate included."""
    return cast(dict[str, mx.array], dict(tree_flatten(optimizer.state)))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
