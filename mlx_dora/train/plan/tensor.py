"""Calculates memory and traffic of tensor parallelism, from the shapes of a model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.layers import TENSOR_TYPES
from mlx_dora.matrix.sharded import gather_bytes, sum_bytes
from mlx_dora.matrix.weight import TENSOR_COLUMNS
from mlx_dora.train.plan.traffic import DividedModule, Traffic, first_trained

# Config keys of what mlx-lm's method ``shard`` divides.
_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


_LAST_STAGE = 3  # of a block's last projection, see `DividedModule.stage`


class _Member:
    """The first process of a group, to code that does not communicate."""

    def __init__(self, size: int) -> None:
        self._size = size

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size


def divided_kinds(empty: nn.Module, processes: int) -> dict[str, int]:
    """Divide a model without weights, in place, as `divide_tensors` would.

    Args:
        empty: The model, whose arrays are not evaluated.
        processes: Number of processes.

    Returns:
        The divided axis of each divided layer, by path.

    Raises:
        DoRAError: If mlx-lm cannot divide it.
    """
    name = type(empty).__module__.rpartition(".")[2]
    if not callable(getattr(type(empty), "shard", None)):
        raise DoRAError(
            f"no plan with shard tensor: mlx-lm cannot divide {name}. Use shard full."
        )
    group = cast(mx.distributed.Group, _Member(processes))
    try:
        cast(Any, empty).shard(group)
    except ValueError as error:
        raise DoRAError(
            f"no plan with shard tensor ({name}): {' '.join(str(error).split())}"
        ) from error
    return {
        path: int(isinstance(module, TENSOR_COLUMNS))
        for path, module in empty.named_modules()
        if isinstance(module, TENSOR_TYPES)
    }


def divided_config(text: dict[str, Any], processes: int) -> dict[str, Any]:
    """Return a text model's config for one process.

    Raises:
        DoRAError: If heads or the MLP's width cannot be divided.
    """
    heads = text["num_attention_heads"]
    divided = {"num_key_value_heads": heads, **text}
    problems = [
        f"{key} is {divided[key]}, which {processes} does not divide"
        for key in _DIVIDED
        if divided[key] % processes
    ]
    if problems:
        raise DoRAError(f"no plan with shard tensor: {'; '.join(problems)}.")
    head = text.get("head_dim") or text["hidden_size"] // heads
    numbers = {key: divided[key] // processes for key in _DIVIDED}
    return {**text, "head_dim": head, **numbers}


def with_axes(
    modules: Sequence[DividedModule], axes: dict[str, int], ranks: dict[str, int]
) -> tuple[DividedModule, ...]:
    """Note the divided axis and the rank of each module; other modules stay whole."""
    return tuple(
        replace(module, axis=axes.get(module.path), rank=ranks.get(module.path, 0))
        for module in modules
    )


def tensor_traffic(
    modules: Sequence[DividedModule],
    *,
    processes: int,
    tokens: int,
    element_bytes: int,
    trainable: int,
    has_norms: bool,
    grad_checkpoint: bool,
    accumulation: int,
) -> Traffic:
    """Calculate the traffic of a training with tensor parallelism.

    Args:
        modules: From `with_axes`.
        processes: Number of processes.
        tokens: Input tokens of a batch, padding included.
        element_bytes: Bytes per element of an activation.
        trainable: Number of trainable parameters.
        has_norms: Whether the adapters are DoRA's.
        grad_checkpoint: Whether blocks are recomputed.
        accumulation: Number of batches per update.
    """
    first = first_trained(modules)
    sent = norms = messages = 0
    for module in modules:
        if module.axis is None or module.block is None:
            continue
        is_recomputed = grad_checkpoint and module.block >= first[0]
        if module.axis:
            # Outputs and low-rank activations are summed; recomputed blocks do so
            # again where the backward pass needs the sum.
            width = module.rows + module.rank
            is_last = module.stage == _LAST_STAGE and not module.is_adapted
            times = 1 + (is_recomputed and not is_last)
            norms += module.is_adapted * sum_bytes(4 * module.rows, processes)
        else:
            # The gradients of the input are summed, if there are any: a recomputed
            # block has those of all its inputs.
            is_traced = (module.block, module.stage) > first or is_recomputed
            width, times = module.width, int(is_traced)
            norms += module.is_adapted * gather_bytes(4 * module.rows, processes)
        sent += times * sum_bytes(tokens * width * element_bytes, processes)
        messages += times
    return Traffic(
        activations=sent,
        norms=norms // accumulation if has_norms else 0,
        gradients=sum_bytes(4 * trainable, processes) // accumulation,
        messages=messages,
    )
