"""Training with a model's frozen weights divided among the processes."""

import logging

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.sharding import PendingDivision, shard_loaded
from mlx_dora.adapters.tensor import describe_division, divide_tensors, share_squares
from mlx_dora.errors import DoRAError
from mlx_dora.layers import has_divided
from mlx_dora.train.config import Shard, TrainConfig
from mlx_dora.train.group import together

logger = logging.getLogger(__name__)


def check_shardable(
    train: TrainConfig, dora: DoRAConfig, group: mx.distributed.Group
) -> None:
    """Refuse settings that a divided model cannot be trained with.

    Raises:
        DoRAError: In full fine-tuning, which trains the weights, for variants, and for
            objectives other than sft.
    """
    if train.shard is None:
        return
    if train.fine_tune_type == "full":
        raise DoRAError(
            "shard divides frozen weights, and full fine-tuning trains them: set "
            "fine_tune_type to dora or lora."
        )
    if train.objective != "sft":
        raise DoRAError(
            f"shard supports objective sft, not {train.objective}: its processes would "
            "not take the same passes. Leave out shard, or use objective sft."
        )
    if not dora.is_plain:
        raise DoRAError(
            "shard supports plain DoRA and LoRA: leave out variant, init and "
            "magnitude_keys."
        )
    if group.size() == 1:
        logger.warning(
            "shard has no effect on a single process; start several with mlx.launch"
        )


def divide(model: nn.Module, group: mx.distributed.Group, shard: Shard) -> None:
    """Divide a model that is not divided yet.

    Raises:
        SharedError: If the model cannot be divided in this way, or has adapters.
    """
    if group.size() == 1 or has_divided(model):
        return
    if shard == "tensor":
        with together(group):
            divide_for_tensors(model, group)
        share_squares(model)
        return
    with together(group):
        pending = shard_loaded(model, group)
    finish(pending)


def divide_for_tensors(model: nn.Module, group: mx.distributed.Group) -> None:
    """Divide a model for tensor parallelism, and log how; nothing is communicated."""
    paths = divide_tensors(model, group)
    if group.rank() == 0:
        logger.info("%s", describe_division(paths, group.size()))


def finish(pending: PendingDivision) -> nn.Module:
    """Divide the model whose rows were read, log how, and return it."""
    if pending.group.rank() == 0:
        for line in pending.division.describe(pending.group.size()):
            logger.info("%s", line)
    return pending.finish()
