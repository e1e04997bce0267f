"""Adds adapters to a model, removes them, and disables them."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.keys import (
    blocks,
    last_blocks,
    natural_order,
    near_names,
    passed_over,
    resolve_keys,
)
from mlx_dora.adapters.refusals import (
    check_classes,
    check_dense,
    check_ranks,
    check_started,
)
from mlx_dora.errors import DoRAError
from mlx_dora.layers import TENSOR_TYPES, DoRALayer, adapt, lora_over
from mlx_dora.layers.variants import VariantLinear
from mlx_dora.layers.variants.doran_aux import DoRANAux, share_first_layers

FineTuneType = Literal["dora", "lora", "full"]

# mlx-lm's own layers, recognized by module name, because importing it takes a second.
_HOST_ADAPTERS = ("mlx_lm.tuner.lora", "mlx_lm.tuner.dora")


def _is_of_host(module: nn.Module) -> bool:
    return any(cls.__module__ in _HOST_ADAPTERS for cls in type(module).__mro__)


def dora_layers(model: nn.Module) -> list[tuple[str, DoRALayer]]:
    """Return the model's DoRA layers, including variants, by path in natural order."""
    return [
        (path, layer)
        for path, layer in adapter_layers(model)
        if isinstance(layer, DoRALayer)
    ]


def adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return all adapted layers, including mlx-lm's LoRA and DoRA, in natural order.

    All have ``lora_a``, ``lora_b``, ``scale`` and ``dropout`` (variants after export);
    mlx-lm's layers are untyped.
    """
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, DoRALayer) or _is_of_host(module)
    ]
    return sorted(layers, key=lambda item: natural_order(item[0]))


def adapted_already(model: nn.Module) -> str:
    """Return the problem of a model that has adapters; empty if it has none."""
    if not (layers := adapter_layers(model)):
        return ""
    return (
        f"the model has {len(layers)} adapted layers already ({layers[0][0]}, ...); "
        "remove them with remove_dora first"
    )


def base_of(layer: nn.Module) -> nn.Module:
    """Return the frozen module that an adapted layer wraps."""
    return layer["embedding"] if "embedding" in layer else layer["linear"]


def apply_dora(model: nn.Module, config: DoRAConfig) -> list[str]:
    """Adapt a model in place: freeze it and wrap its modules in DoRA layers.

    Afterwards only the adapter's parameters are trainable, and the model's output is
    unchanged (with PiSSA initialization, up to rounding).

    Args:
        model: A model without adapters.
        config: The modules to adapt, with rank and scale.

    Returns:
        The full paths of the adapted modules, in natural order.

    Raises:
        DoRAError: If a key or an entry of `rank_pattern` matches nothing, a module
            cannot take DoRA or the variant (all of them by name), a rank is above
            min(out, in), there are fewer blocks than `num_layers`, or the model has
            adapters already. The model is unchanged.
        TypeError: If `config` is not a `DoRAConfig`.
    """
    return _adapt(model, config, any_rank=False)


def _adapt(model: nn.Module, config: DoRAConfig, any_rank: bool) -> list[str]:
    """Do the work of `apply_dora`; with `any_rank`, do not check the ranks."""
    if not isinstance(config, DoRAConfig):
        raise TypeError(f"config must be a DoRAConfig, got {type(config).__name__}")
    paths = adaptable_paths(model, config)
    modules = dict(model.named_modules())
    chosen = variants_of(model, config, paths)
    if config.keys is None:
        others = passed_over(model, config.num_layers)
        hint = " Leave them out by giving keys."
        check_classes(modules, chosen | variants_of(model, config, others), hint)
    else:
        check_classes(modules, chosen, "")
    check_started(model)
    if not any_rank:
        low_rank = [path for path in paths if chosen[path] != "magnitude"]
        _check_ranks(modules, config, low_rank)
    model.freeze()
    layers: list[tuple[str, nn.Module]] = []
    for path in paths:
        layer = adapt(
            modules[path],
            chosen[path],
            r=config.rank_of(path),
            dropout=config.dropout,
            scale=config.scale_of(path),
        )
        layer.train(model.training)
        layer.path = path
        layers.append((path, layer))
    _share_in_blocks(model, layers, config.aux_width)
    put_modules(model, layers)
    return paths


def _check_ranks(
    modules: dict[str, nn.Module], config: DoRAConfig, paths: list[str]
) -> None:
    patterned = {p: config.rank_of(p) for p in paths if config.pattern_for(p)}
    others = {path: config.rank for path in paths if path not in patterned}
    check_ranks(modules, patterned, are_named=True)
    check_ranks(modules, others, are_named=config.keys is not None)


def variants_of(
    model: nn.Module, config: DoRAConfig, paths: list[str]
) -> dict[str, str]:
    """Return the variant of each module at `paths`, for `mlx_dora.layers.adapt`."""
    general = "pissa" if config.init == "pissa" else config.variant
    alone: set[str] = set()
    if config.magnitude_keys is not None:
        alone.update(resolve_keys(model, config.magnitude_keys, config.num_layers))
    return {path: "magnitude" if path in alone else general for path in paths}


def export_variants(model: nn.Module) -> None:
    """Replace every variant with its equivalent plain DoRA layer, in place.

    Raises:
        DoRAError: If a variant has no equivalent; names the layers.
    """
    put_modules(model, exported_layers(model))


def exported_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return `adapter_layers` with plain DoRA layers in place of variants.

    Raises:
        DoRAError: If a variant has no equivalent; names the layers.
    """
    layers = []
    for path, layer in adapter_layers(model):
        try:
            plain = layer.export() if isinstance(layer, DoRALayer) else layer
        except DoRAError as error:
            raise DoRAError(f"{path}: {error}") from error
        layers.append((path, plain))
    return layers


def apply_layers(
    model: nn.Module,
    config: DoRAConfig,
    fine_tune_type: FineTuneType,
    *,
    any_rank: bool = False,
) -> list[str]:
    """Make a model trainable by the method `fine_tune_type`.

    Args:
        model: A model without adapters.
        config: The modules to adapt; for ``"full"``, only `num_layers` is used.
        fine_tune_type: ``"dora"`` calls `apply_dora`; ``"lora"`` uses mlx-lm's LoRA
            layers on the same modules; ``"full"`` unfreezes the last blocks.
        any_rank: Accept ranks above min(out, in), which existing adapters may have.

    Returns:
        The full paths of the adapted modules, or of the unfrozen blocks.

    Raises:
        DoRAError: As `apply_dora`, or for an unknown `fine_tune_type`.
    """
    ways: dict[str, Callable[[nn.Module, DoRAConfig, bool], list[str]]] = {
        "dora": _adapt,
        "lora": _apply_lora,
        "full": _unfreeze_blocks,
    }
    if fine_tune_type not in ways:
        raise DoRAError(
            f"fine_tune_type must be {', '.join(ways)}; got {fine_tune_type!r}."
        )
    return ways[fine_tune_type](model, config, any_rank)


def remove_dora(model: nn.Module) -> list[str]:
    """Remove every adapter and restore the same base modules, still frozen.

    Also removes mlx-lm's LoRA and DoRA layers.

    Returns:
        The paths that were adapted.
    """
    layers = adapter_layers(model)
    put_modules(model, [(path, base_of(layer)) for path, layer in layers])
    return [path for path, _ in layers]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Make the model behave as its base during the block.

    Layers that were disabled before stay disabled afterwards. The layers are restored
    after an exception, too.
    """
    ours = dora_layers(model)
    before = [layer.enabled for _, layer in ours]
    adapted = {path for path, _ in ours}
    others = [(p, layer) for p, layer in adapter_layers(model) if p not in adapted]
    try:
        for _, layer in ours:
            layer.enabled = False
        put_modules(model, [(path, base_of(layer)) for path, layer in others])
        yield
    finally:
        put_modules(model, others)
        for (_, layer), enabled in zip(ours, before, strict=True):
            layer.enabled = enabled


def adaptable_paths(model: nn.Module, config: DoRAConfig) -> list[str]:
    """Resolve the config's keys and check its rank pattern against them.

    Raises:
        DoRAError: As for `apply_dora`, except that classes of modules are not checked.
    """
    if problem := adapted_already(model):
        raise DoRAError(f"{problem}.")
    paths = resolve_keys(model, config.keys, config.num_layers)
    if config.magnitude_keys is not None:
        alone = resolve_keys(model, config.magnitude_keys, config.num_layers)
        both = set(alone) & set(paths) if config.keys is not None else ()
        if both:
            raise DoRAError(
                f"keys and magnitude_keys both name {', '.join(sorted(both))}."
            )
        paths = sorted({*paths, *alone}, key=natural_order)
    used = {config.pattern_for(path) for path in paths}
    unused = [name for name in config.rank_pattern or {} if name not in used]
    if unused and paths:
        hints = [f"{name!r}{near_names(name, paths)}" for name in unused]
        raise DoRAError(f"rank_pattern matches no adapted module: {', '.join(hints)}.")
    return paths


def put_modules(model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
    """Replace the modules at these paths."""
    if modules:
        model.update_modules(tree_unflatten(modules))


def _share_in_blocks(
    model: nn.Module, layers: list[tuple[str, nn.Module]], width: int
) -> None:
    """Share the networks of variant doran-aux within each block; not outside blocks."""
    places = [f"{path}." for path, _ in blocks(model)]
    groups: dict[str, list[VariantLinear]] = {}
    for path, layer in layers:
        if isinstance(layer, VariantLinear) and layer.kind.name == DoRANAux.name:
            place = next((p for p in places if path.startswith(p)), path)
            groups.setdefault(place, []).append(layer)
    for group in groups.values():
        share_first_layers(group, width)


def _apply_lora(model: nn.Module, config: DoRAConfig, any_rank: bool) -> list[str]:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    paths = adaptable_paths(model, config)
    check_started(model)
    if not any_rank:
        _check_ranks(dict(model.named_modules()), config, paths)
    model.freeze()
    settings: dict[tuple[int, float], list[str]] = {}
    for path in paths:
        setting = config.rank_of(path), config.scale_of(path)
        settings.setdefault(setting, []).append(path)
    divided = [m for m in model.modules() if isinstance(m, TENSOR_TYPES)]
    for module in divided:  # mlx-lm calls this
        object.__setattr__(module, "to_lora", partial(lora_over, module))
    try:
        for (rank, scale), keys in settings.items():
            parameters = {
                "rank": rank,
                "scale": scale,
                "dropout": config.dropout,
                "keys": keys,
            }
            linear_to_lora_layers(model, config.num_layers, parameters)
    except ValueError as error:
        remove_dora(model)
        raise DoRAError(f"LoRA: {error}.") from error
    finally:
        for module in divided:
            object.__delattr__(module, "to_lora")
    for _, layer in adapter_layers(model):
        layer.train(model.training)
    return paths


def _unfreeze_blocks(
    model: nn.Module, config: DoRAConfig, _any_rank: bool
) -> list[str]:
    chosen = last_blocks(model, config.num_layers)
    check_started(model)
    check_dense(chosen)
    model.freeze()
    for _, block in chosen:
        block.unfreeze()
    return [path for path, _ in chosen]
