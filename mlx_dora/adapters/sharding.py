"""Divides a model's frozen weights among the processes of a group.

Each process reads its own rows from the model's files: the whole model is never in the
memory of one process.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.adapter import remember_source
from mlx_dora.adapters.fingerprint import fingerprint, remember_fingerprint
from mlx_dora.adapters.hosting import load, model_folder
from mlx_dora.adapters.keys import natural_order, shortened, takes_lora
from mlx_dora.adapters.origins import origins_of
from mlx_dora.adapters.surgery import adapted_already, put_modules
from mlx_dora.errors import DoRAError
from mlx_dora.layers.sharded import (
    SHARDABLE,
    ShardedEmbedding,
    ShardedLinear,
    ShardedModule,
    has_divided,
)
from mlx_dora.matrix.sharded import Part, own_rows
from mlx_dora.matrix.weight import TENSOR_ROWS, row_squares, weight_from, weight_of

logger = logging.getLogger(__name__)

_WEIGHTS = ("weight", "scales", "biases")


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a model was divided.

    Args:
        divided: Paths of the modules that each process holds a share of.
        whole: Paths of linear layers and embeddings that every process holds whole,
            because their rows cannot be divided evenly.
        read_whole: Names of weights that each process had to read whole, because
            mlx-lm changes them while it loads the model.
    """

    divided: tuple[str, ...]
    whole: tuple[str, ...]
    read_whole: tuple[str, ...] = ()

    def describe(self, processes: int) -> list[str]:
        """Return lines of text for the log."""
        lines = [
            f"Sharded: each of {processes} processes holds 1/{processes} of the rows "
            f"of {len(self.divided)} modules"
        ]
        if self.whole:
            lines.append(
                f"Held whole by every process, since {processes} does not divide their "
                f"rows: {shortened(self.whole)}"
            )
        if self.read_whole:
            lines.append(
                "Read whole while loading, since mlx-lm changes these tensors: "
                f"{shortened(self.read_whole)}"
            )
        return lines


@dataclass(kw_only=True)
class PendingDivision:
    """A model whose weights are not divided yet; nothing was communicated.

    `load_sharded` and `shard_loaded` take the own rows of each module, which may fail
    in one process. `finish` then exchanges what all need.

    Args:
        model: The model, whose modules `finish` replaces.
        group: The processes.
        division: Which modules are divided.
        parts: This process's rows, by the path of their module.
    """

    model: nn.Module
    group: mx.distributed.Group
    division: Division
    parts: dict[str, Part] = field(default_factory=dict)

    def finish(self) -> nn.Module:
        """Replace the modules; all processes must make this call."""
        modules = dict(self.model.named_modules())
        paths = list(self.parts)
        own = []
        for path in paths:
            own.append(row_squares(self.parts[path]))
            mx.eval(own[-1])
        sizes = [square.size for square in own]
        every = mx.distributed.all_gather(
            mx.concatenate(own).reshape(1, -1), group=self.group
        )
        mx.eval(every)
        made: list[tuple[str, nn.Module]] = []
        known: dict[int, ShardedModule] = {}
        start = 0
        for path, size in zip(paths, sizes, strict=True):
            module = modules[path]
            squares = mx.contiguous(every[:, start : start + size].reshape(-1))
            mx.eval(squares)
            start += size
            kind = ShardedLinear
            if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
                kind = ShardedEmbedding
            part = self.parts.pop(path)
            known[id(module)] = kind.from_part(
                part, squares, self.group, module.get("bias")
            )
            known[id(module)].train(module.training)
            known[id(module)].name_as(path)
        for path, module in modules.items():
            if id(module) in known:  # shared modules under each of their paths
                made.append((path, known[id(module)]))
        put_modules(self.model, made)
        mx.eval(self.model.parameters())
        self.model(mx.array([[0, 0]]))  # the graph alone: refuses direct reads
        return self.model


def shard_loaded(model: nn.Module, group: mx.distributed.Group) -> PendingDivision:
    """Take this process's rows of a model in memory, which must have no adapters.

    Nothing is communicated yet; call `PendingDivision.finish` where no process fails.

    Args:
        model: The same model in every process; `finish` changes it in place.
        group: The processes, more than one.

    Raises:
        DoRAError: If the model has adapters or experts.
    """
    modules, division = _divide(model, group)
    remember_fingerprint(model, fingerprint(model))
    pending = PendingDivision(model=model, group=group, division=division)
    for path, module in modules:
        arrays = {
            name: mx.contiguous(module[name][own_rows(module[name].shape[0], group)])
            for name in _WEIGHTS
            if module.get(name) is not None
        }
        mx.eval(arrays)
        pending.parts[path] = cast(Part, weight_from(arrays, module))
    return pending


def load_sharded(
    model: str | Path,
    group: mx.distributed.Group,
    *,
    trust_remote_code: bool = False,
) -> tuple[PendingDivision, Any]:
    """Load a model of which this process reads only its rows, and the tokenizer.

    Nothing is communicated yet; call `PendingDivision.finish` where no process fails.

    Args:
        model: A local model folder, or a Hub id.
        group: The processes.
        trust_remote_code: Allow Python code in the model's folder to run.

    Raises:
        DoRAError: If the model cannot be loaded, or has experts.
    """
    folder = model_folder(model)
    loaded, tokenizer = load(folder, lazy=True, trust_remote_code=trust_remote_code)
    origins = origins_of(loaded)
    remember_source(loaded, str(model))
    modules, division = _divide(loaded, group)
    remember_fingerprint(loaded, fingerprint(loaded))
    pending = PendingDivision(model=loaded, group=group, division=division)
    read_whole = []
    for path, module in modules:
        arrays = {}
        for name in _WEIGHTS:
            if (array := module.get(name)) is None:
                continue
            own = own_rows(array.shape[0], group)
            stored = origins.stored(array)
            if stored is None:
                read_whole.append(f"{path}.{name}")
                arrays[name] = mx.contiguous(array[own])
            else:
                arrays[name] = stored[own]
            # Drop the model's own array, which would be read whole with the others.
            module[name] = mx.zeros((0, *array.shape[1:]), array.dtype)
            del array
            mx.eval(arrays[name])
        pending.parts[path] = cast(Part, weight_from(arrays, module))
    mx.eval(loaded.parameters())
    pending.division = Division(
        divided=division.divided, whole=division.whole, read_whole=tuple(read_whole)
    )
    return pending, tokenizer


def _divide(
    model: nn.Module, group: mx.distributed.Group
) -> tuple[list[tuple[str, nn.Module]], Division]:
    """Return the modules to divide, each once, in natural order."""
    if problem := adapted_already(model):
        raise DoRAError(f"{problem}.")
    named = sorted(model.named_modules(), key=lambda item: natural_order(item[0]))
    experts = [p for p, m in named if takes_lora(m) and not isinstance(m, SHARDABLE)]
    if experts:
        raise DoRAError(
            f"shard cannot divide experts: {shortened(experts)}. Train this model "
            "without shard."
        )
    seen: set[int] = set()
    modules: list[tuple[str, nn.Module]] = []
    whole: list[str] = []
    for path, module in named:
        if type(module) not in SHARDABLE or id(module) in seen:
            continue
        seen.add(id(module))
        if module["weight"].shape[0] % group.size():
            whole.append(path)
        else:
            modules.append((path, module))
    if not modules:
        raise DoRAError(
            f"shard: {group.size()} processes divide the rows of no weight of this "
            "model."
        )
    paths = tuple(path for path, _ in modules)
    return modules, Division(divided=paths, whole=tuple(whole))


def parameter_count(model: nn.Module) -> int:
    """Number of parameters of a model, all rows of divided weights included."""
    from mlx_lm.utils import get_total_parameters

    if not has_divided(model):
        return get_total_parameters(model)
    leaves = tree_flatten(
        model.leaf_modules(), is_leaf=lambda m: isinstance(m, nn.Module)
    )
    return sum(_count(module) for _, module in cast(Sequence[Any], leaves))


def _count(module: nn.Module) -> int:
    """Number of parameters of a module, those of packed weights unpacked."""
    arrays = cast(Sequence[tuple[str, mx.array]], tree_flatten(module.parameters()))
    others = sum(array.size for name, array in arrays if name not in _WEIGHTS)
    if isinstance(module, TENSOR_ROWS):  # the bias is divided too
        others *= module.group.size()
    matrix = math.prod(weight_of(module).shape) if "weight" in module else 0
    return matrix + others
