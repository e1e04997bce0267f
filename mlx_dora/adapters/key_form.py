"""Decides how an adapter's files name the adapted modules.

Relative keys (``self_attn.q_proj``) with a positive ``num_layers`` are the only form
that Swift hosts read; mlx-lm reads full paths, too. A file has relative keys wherever
they select exactly the adapted modules, and full paths elsewhere.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import mlx.nn as nn

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.keys import blocks, is_index, natural_order, shortened


@dataclass(frozen=True, kw_only=True)
class KeyForm:
    """The keys of a file and the number of last blocks to which they refer.

    Attributes:
        keys: Names relative to a block, or full paths.
        num_layers: Number of last blocks, at least 1; with full paths, the number of
            last blocks that contain all adapted modules inside blocks.
        why_full: Why relative keys are impossible; empty if the keys are relative.
    """

    keys: tuple[str, ...]
    num_layers: int
    why_full: str = ""


def key_form(model: nn.Module, paths: Sequence[str]) -> KeyForm:
    """Return the form of the keys for modules of a model at full `paths`.

    The keys are relative if mlx-lm selects exactly `paths` with them: the adapted
    modules are those of the same names in each of the last N blocks. A block without
    a module of that name, as in models that mix kinds of blocks, does not matter.
    """
    layers = blocks(model)
    modules = {path for path, _ in model.named_modules()}
    places = [path for path, _ in layers]
    inside: dict[str, tuple[int, str]] = {}  # block and name in it, by full path
    for at, (place, block) in enumerate(layers):
        names_in_block = [name for name, _ in block.named_modules() if name]
        inside |= {f"{place}.{name}": (at, name) for name in names_in_block}
    outside = [path for path in paths if path not in inside]
    adapted = [inside[path] for path in paths if path in inside]
    names = {name for _, name in adapted}
    first = min([at for at, _ in adapted], default=len(places))
    depth = max(1, len(places) - first)
    why = ""
    if outside:
        why = f"modules outside the blocks are adapted: {shortened(outside)}"
    elif len(places) != len(getattr(model, "layers", ())):
        why = "the model's blocks cannot be counted from its last"
    elif clash := names & modules:
        why = f"a module outside the blocks has the same name: {shortened(clash)}"
    else:
        chosen = {f"{place}.{name}" for place in places[first:] for name in names}
        if others := (chosen & modules) - set(paths):
            why = f"the last {depth} blocks are not adapted alike: without " + (
                shortened(sorted(others, key=natural_order))
            )
    if why:
        return KeyForm(keys=tuple(paths), num_layers=depth, why_full=why)
    keys = tuple(sorted(names, key=natural_order))
    return KeyForm(keys=keys, num_layers=depth)


def with_key_form(
    config: DoRAConfig, model: nn.Module, paths: Sequence[str] | None = None
) -> DoRAConfig:
    """Return a config whose keys have the form for files.

    Args:
        config: The config; without `paths`, its keys must be full paths.
        model: The base, adapted or not.
        paths: Full paths of the adapted modules.
    """
    form = key_form(model, config.keys or () if paths is None else paths)
    return replace(config, keys=form.keys or None, num_layers=form.num_layers)


def kept_form(config: DoRAConfig, paths: Sequence[str]) -> KeyForm:
    """Return the form of the keys of an adapter whose model is not at hand.

    Relative keys of the config are kept if they fit the adapter's `paths`. If they
    refer to all blocks (``num_layers`` 0 or -1, as mlx-lm writes), the paths must show
    that every block is adapted alike.
    """
    form = _uniform(paths)
    relative = [key for key in config.keys or () if key not in set(paths)]
    if not relative:
        why = "the keys are full paths, and the model's blocks are not known"
    elif config.num_layers > 0 and _fit(relative, config.num_layers, paths):
        return KeyForm(keys=tuple(relative), num_layers=config.num_layers)
    elif isinstance(form, str):
        why = form
    elif config.num_layers < 1 and form.keys == tuple(sorted(relative)):
        return form
    else:
        why = "the keys of the config are not those of the tensors"
    depth = config.num_layers
    if depth < 1:
        depth = 1 if isinstance(form, str) else form.num_layers
    return KeyForm(keys=tuple(paths), num_layers=depth, why_full=why)


def form_of_all_blocks(
    config: DoRAConfig, paths: Sequence[str], adapts: Callable[[str], bool]
) -> DoRAConfig:
    """Return a config with relative keys if `paths` are in every block of the model.

    Args:
        config: A config with full paths as keys.
        paths: Full paths of the adapted modules.
        adapts: Whether a module of that path would be adapted if the model had it. It
            is asked about the block after the last: if that block would be adapted,
            there is no such block, so the last block of `paths` is the model's last.
    """
    form = _uniform(paths)
    if isinstance(form, str):
        return config
    place = _split(paths[0])[0]
    if not all(adapts(f"{place}.{form.num_layers}.{name}") for name in form.keys):
        return config
    return replace(config, keys=form.keys, num_layers=form.num_layers)


def _uniform(paths: Iterable[str]) -> KeyForm | str:
    """Return the keys of blocks 0 to N − 1 if all have the same, or why not."""
    places: set[str] = set()
    by_block: dict[int, set[str]] = {}
    for path in paths:
        place, index, name = _split(path)
        if index is None:
            return f"modules outside the blocks are adapted: {path}"
        places.add(place)
        by_block.setdefault(index, set()).add(name)
    if len(places) != 1:
        return "the adapted modules are not in one list of blocks"
    names = next(iter(by_block.values()))
    if any(other != names for other in by_block.values()) or (
        sorted(by_block) != list(range(len(by_block)))
    ):
        return "the blocks are not adapted alike"
    return KeyForm(keys=tuple(sorted(names)), num_layers=len(by_block))


def _fit(keys: Iterable[str], num_layers: int, paths: Iterable[str]) -> bool:
    """Whether keys of the last blocks can be those of all these modules."""
    names: dict[str, list[int]] = {}
    for path in paths:
        _, index, name = _split(path)
        if index is None:
            return False
        names.setdefault(name, []).append(index)
    indices = [index for places in names.values() for index in places]
    return set(keys) == names.keys() and max(indices) - min(indices) < num_layers


def _split(path: str) -> tuple[str, int | None, str]:
    """Return the list of blocks, the number of the block and the name in the block."""
    parts = path.split(".")
    for at, part in enumerate(parts[:-1]):
        if is_index(part):
            return ".".join(parts[:at]), int(part), ".".join(parts[at + 1 :])
    return path, None, ""
