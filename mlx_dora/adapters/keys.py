"""Resolves the keys of a config to full paths of a model's modules."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.layers import TENSOR_TYPES

# Modules that mlx-lm adapts without keys. Classes of experts are recognized by their
# module's name, because importing mlx_lm is slow.
_LINEARS = (
    *(nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding),
    *TENSOR_TYPES,
)
_EXPERTS = "mlx_lm.models.switch_layers"
_LISTED = 10


def is_index(part: str) -> bool:
    """Whether a part of a path is a number; unlike `str.isdigit`, rejects ``²``."""
    return part.isdecimal() and len(part) < 19


def natural_order(path: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts ``layers.2`` before ``layers.10``."""
    return [
        (0, int(part), "") if is_index(part) else (1, 0, part)
        for part in path.split(".")
    ]


def blocks(
    model: nn.Module, modules: Mapping[str, nn.Module] | None = None
) -> list[tuple[str, nn.Module]]:
    """Return the model's ``layers`` with their paths; empty if it has none.

    Args:
        model: The model.
        modules: Its modules by path, if the caller has walked them already.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        return []
    walked = model.named_modules() if modules is None else modules.items()
    paths = {id(module): path for path, module in walked}
    return [
        (paths[id(block)], block)
        for block in layers
        if isinstance(block, nn.Module) and id(block) in paths
    ]


def last_blocks(
    model: nn.Module,
    num_layers: int,
    modules: Mapping[str, nn.Module] | None = None,
) -> list[tuple[str, nn.Module]]:
    """Return the last `num_layers` blocks; -1 means all, 0 none. See `blocks`.

    Raises:
        DoRAError: If the model has fewer blocks, or none at all.
    """
    layers = blocks(model, modules)
    if not layers:
        raise DoRAError(
            f"{type(model).__name__} has no blocks in .layers; name the modules to "
            "adapt in keys, as full paths."
        )
    if num_layers > len(layers):
        raise DoRAError(
            f"num_layers is {num_layers}, but the model has only {len(layers)} blocks "
            "(-1 adapts all)."
        )
    return layers if num_layers == -1 else layers[len(layers) - num_layers :]


def resolve_keys(
    model: nn.Module, keys: Iterable[str] | None, num_layers: int
) -> list[str]:
    """Return the full paths of the modules that `keys` and `num_layers` select.

    As in mlx-lm, a key names a module relative to each of the last `num_layers` blocks,
    or by its full path, independent of `num_layers`. Without keys, every linear layer
    and embedding in those blocks is selected.

    Raises:
        DoRAError: If a key matches no module (suggests similar names), or the model has
            fewer blocks.
    """
    if keys is None:
        return [
            _join(path, name)
            for path, block in last_blocks(model, num_layers)
            for name, module in _modules(block)
            if takes_lora(module)
        ]
    modules = dict(model.named_modules())
    relative = [key for key in keys if key not in modules]
    chosen = last_blocks(model, num_layers, modules) if relative else []
    everywhere = blocks(model, modules) if relative else []
    paths = {key for key in keys if key in modules}
    unmatched = []
    for key in relative:
        matches = {_join(path, key) for path, _ in chosen} & modules.keys()
        elsewhere = any(_join(path, key) in modules for path, _ in everywhere)
        if not matches and not (num_layers == 0 and elsewhere):
            unmatched.append(_unmatched(model, key, elsewhere, num_layers))
        paths |= matches
    if unmatched:
        raise DoRAError(f"keys: {'; '.join(unmatched)}.")
    return sorted(paths, key=natural_order)


def passed_over(model: nn.Module, num_layers: int) -> list[str]:
    """Return full paths of modules named linear, but of unknown class, in the blocks.

    Without keys, `resolve_keys` skips them, as mlx-lm does. They are packed layers of
    mlx-lm, such as ``BitLinear``, whose matrix only the layer itself can read.
    """
    return [
        _join(path, name)
        for path, block in last_blocks(model, num_layers)
        for name, module in _modules(block)
        if type(module).__name__.endswith(("Linear", "Embedding"))
        and _holds_matrix(module)
        and not isinstance(module, _LINEARS)
    ]


def shortened(names: Iterable[str]) -> str:
    """Join names with commas; after ten, give only the number of the others."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def near_names(name: str, names: Iterable[str]) -> str:
    """Return a hint in parentheses with names similar to `name`, or ""."""
    near = difflib.get_close_matches(name, sorted(set(names)), n=3, cutoff=0.5)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _unmatched(model: nn.Module, key: str, elsewhere: bool, num_layers: int) -> str:
    if elsewhere:
        return f"{key!r} is in none of the last {num_layers} blocks"
    names = [path for path, _ in model.named_modules() if path]
    for path, block in blocks(model):
        names += [name for name, _ in block.named_modules() if name]
        names = [name for name in names if not name.startswith(f"{path}.")]
    return f"no module is called {key!r}{near_names(key, names)}"


def _modules(block: nn.Module) -> list[tuple[str, nn.Module]]:
    return sorted(block.named_modules(), key=lambda item: natural_order(item[0]))


def takes_lora(module: nn.Module) -> bool:
    """Whether mlx-lm has a LoRA layer for a module: linear, embedding or experts."""
    is_experts = type(module).__module__ == _EXPERTS and "weight" in module
    return isinstance(module, _LINEARS) or is_experts


def _holds_matrix(module: nn.Module) -> bool:
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim == 2


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
