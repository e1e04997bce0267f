"""Loads weights and optimizer state from a checkpoint or another process."""

from collections.abc import Mapping
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_dora.errors import DoRAError
from mlx_dora.train.group import share_tensors
from mlx_dora.train.run.checkpoint import Checkpoint
from mlx_dora.train.run.start import kept_tensors


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: optim.Optimizer
) -> None:
    """Load a checkpoint into a model made trainable as in its run, and its optimizer.

    Raises:
        DoRAError: If names or shapes differ from those of the model or optimizer.
    """
    weights = kept_tensors(model)
    moments = optimizer_tensors(optimizer)
    for what, stored, wanted in (
        ("weights", checkpoint.weights, weights),
        ("the optimizer's arrays", checkpoint.optimizer, moments),
    ):
        shapes = {name: value.shape for name, value in stored.items()}
        if shapes != {name: value.shape for name, value in wanted.items()}:
            raise DoRAError(
                f"{checkpoint.path} does not fit the model: {what} have different "
                "names or shapes."
            )
    _put(model, optimizer, checkpoint.weights, checkpoint.optimizer)


def share_start(
    model: nn.Module, optimizer: optim.Optimizer, group: mx.distributed.Group
) -> None:
    """Copy the first process's weights and optimizer state to all processes."""
    if group.size() > 1:
        weights = share_tensors(kept_tensors(model), group)
        moments = share_tensors(optimizer_tensors(optimizer), group)
        _put(model, optimizer, weights, moments)


def _put(
    model: nn.Module,
    optimizer: optim.Optimizer,
    weights: Mapping[str, mx.array],
    moments: Mapping[str, mx.array],
) -> None:
    model.load_weights(list(weights.items()), strict=False)
    state = tree_map_with_path(
        lambda name, old: moments[name].astype(old.dtype), optimizer.state
    )
    optimizer.state = cast(dict, state)
    mx.eval(model.trainable_parameters(), optimizer.state)


def optimizer_tensors(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimizer's state by name, including its step and learning rate."""
    return cast(dict[str, mx.array], dict(tree_flatten(optimizer.state)))
