"""Divides a model's blocks among processes that share each batch (tensor parallelism).

mlx-lm knows how: the method ``shard`` of a model divides heads and the MLP's width.
This module refuses by name what that method would divide wrongly, or no adapter fits.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.adapters.fingerprint import fingerprint, remember_fingerprint
from mlx_dora.adapters.keys import natural_order, shortened, takes_lora
from mlx_dora.adapters.surgery import adapted_already
from mlx_dora.errors import DoRAError
from mlx_dora.layers import TENSOR_TYPES, weight_of
from mlx_dora.matrix.sharded import ShardedWeight, own_rows
from mlx_dora.matrix.weight import row_squares

_DIVIDES = (nn.Linear, nn.QuantizedLinear)
_HINT = (
    "Train with shard full, which divides any linear layer; generate text in a single "
    "process."
)


@dataclass(frozen=True, kw_only=True)
class _Before:
    """A module before its model is divided.

    Args:
        kind: Its class.
        numbers: Its own whole numbers, such as a number of heads.
        shapes: Shapes of its own arrays.
    """

    kind: type[nn.Module]
    numbers: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


def divide_tensors(model: nn.Module, group: mx.distributed.Group) -> tuple[str, ...]:
    """Divide a model for tensor parallelism, in place; nothing is communicated.

    `share_squares` must follow where no process has failed.

    Each tensor is read whole before a part of it is kept, one tensor at a time. If this
    raises an error, the model cannot be used.

    Args:
        model: The same model in every process, without adapters, in memory or read
            lazily.
        group: The processes, more than one.

    Returns:
        Paths of the divided layers.

    Raises:
        DoRAError: If mlx-lm cannot divide the model, its heads or widths cannot be
            divided by the number of processes, or it has adapters or experts.
    """
    before, count = _check(model), group.size()
    originals = {
        path: module["weight"]
        for path, module in model.named_modules()
        if type(module) in _DIVIDES
    }
    remember_fingerprint(model, fingerprint(model))
    try:
        cast(Any, model).shard(group)
    except ValueError as error:
        raise _refused(model, f"{' '.join(str(error).split())}") from error
    paths = _compare(model, before, count)
    modules = dict(model.named_modules())
    for path in paths:
        _keep_part(model, path, modules[path], originals.pop(path))
    mx.eval(model.parameters())
    try:
        model(mx.array([[0, 0]]))  # the graph alone, for shapes that do not fit
    except ValueError as error:
        raise _refused(model, str(error)) from error
    return paths


def share_squares(model: nn.Module) -> None:
    """Compute ‖W0‖² of every row of the divided layers, in one message.

    All processes of the group must make this call, after `divide_tensors`.
    """
    modules = [m for m in model.modules() if isinstance(m, TENSOR_TYPES)]
    parts = []
    for module in modules:
        weight = weight_of(module)
        assert isinstance(weight, ShardedWeight)
        own = row_squares(weight.part)
        if not weight.axis:
            rows = weight.own
            own = mx.pad(own, (rows.start, weight.shape[0] - rows.stop))
        mx.eval(own)
        parts.append(own)
    ends = np.cumsum([part.size for part in parts]).tolist()
    every = mx.distributed.all_sum(mx.concatenate(parts), group=modules[0].group)
    for module, squares in zip(modules, mx.split(every, ends[:-1]), strict=True):
        mx.eval(squares)
        module["_row_squares"] = squares


def dividing_loader(
    own: Callable[..., Any], group: mx.distributed.Group
) -> Callable[..., Any]:
    """Wrap mlx-lm's `load_model` so that the processes divide what it loads.

    They also continue from the first process's random numbers, so that all sample the
    same tokens.
    """

    @functools.wraps(own)
    def load_model(path: str | Path, _lazy: bool = False, **settings: Any) -> Any:
        model, config = own(path, lazy=True, **settings)
        divide_tensors(model, group)
        share_squares(model)
        state = mx.random.state[0]  # pyright: ignore[reportIndexIssue] - a list
        first = state if group.rank() == 0 else mx.zeros_like(state)
        high, low = np.array(mx.distributed.all_sum(first, group=group)).tolist()
        mx.random.seed(high << 32 | low)  # the key of MLX's generator
        return model, config

    return load_model


def describe_division(paths: tuple[str, ...], processes: int) -> str:
    """Return a line of text for the log."""
    return (
        f"Sharded: each of {processes} processes computes 1/{processes} of the heads "
        f"and of the MLP's width in {len(paths)} linear layers, and holds the rest of "
        "the model whole"
    )


def _check(model: nn.Module) -> dict[str, _Before]:
    """Refuse what cannot be divided, and return the model's modules."""
    if problem := adapted_already(model):
        raise DoRAError(f"{problem}.")
    kind = type(model)
    if not callable(getattr(kind, "shard", None)):
        raise _refused(model, "mlx-lm has no shard method for it")
    leaves = [(path, m) for path, m in model.named_modules() if takes_lora(m)]
    known = (*_DIVIDES, nn.Embedding, nn.QuantizedEmbedding)
    if others := [path for path, m in leaves if type(m) not in known]:
        raise _refused(model, f"it has experts: {shortened(others)}")
    return {path: _look(module) for path, module in model.named_modules()}


def _look(module: nn.Module) -> _Before:
    own = {**vars(module), **module}
    numbers = {k: v for k, v in own.items() if type(v) is int}
    shapes = {k: v.shape for k, v in own.items() if isinstance(v, mx.array)}
    return _Before(kind=type(module), numbers=numbers, shapes=shapes)


def _compare(
    model: nn.Module, before: Mapping[str, _Before], processes: int
) -> tuple[str, ...]:
    """Return the paths of the divided layers; refuse what was divided otherwise."""
    paths, problems = [], []
    for path, module in model.named_modules():
        old, new = before.get(path), _look(module)
        if isinstance(module, TENSOR_TYPES):
            paths.append(path)
        elif old is None or old.kind is not new.kind or old.shapes != new.shapes:
            problems.append(f"{path or 'the model'} is divided in a way of its own")
        else:
            problems += [
                f"{path}.{name} is {number}, which {processes} does not divide"
                for name, number in old.numbers.items()
                if new.numbers.get(name) == number // processes and number % processes
            ]
    if problems:
        raise _refused(model, "; ".join(problems[:3]))
    if not paths:
        raise _refused(model, "mlx-lm divides none of its linear layers")
    return tuple(sorted(paths, key=natural_order))


def _keep_part(
    model: nn.Module, path: str, module: nn.Module, original: mx.array
) -> None:
    """Compute a process's part, and check that its rows (columns) are consecutive."""
    weight = weight_of(module)
    assert isinstance(weight, ShardedWeight)
    axis, own = weight.axis, own_rows(original.shape[weight.axis], weight.group)
    ends = mx.array([own.start, own.stop - 1])
    expected = mx.take(original, ends, axis=axis)
    mx.eval(expected, module.parameters())
    part = mx.take(module["weight"], mx.array([0, -1]), axis=axis)
    if not mx.array_equal(part, expected, equal_nan=True):
        raise _refused(model, f"{path} is divided in segments")


def _refused(model: nn.Module, reason: str) -> DoRAError:
    kind = type(model)
    name = kind.__module__.rpartition(".")[2]
    return DoRAError(
        f"shard tensor cannot divide this model ({name}): {reason}. {_HINT}"
    )
