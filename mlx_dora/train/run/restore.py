"""Weights and optimizer state put in place: from a checkpoint, or another process."""

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
