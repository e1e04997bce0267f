"""Putting an adapter from disk onto a model, or saying everything that is wrong."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.adapter import (
    LEAVES,
    Adapter,
    adapter_problems,
    listed,
    rank_of,
)
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.adapters.keys import blocks, natural_order, resolve_keys
from mlx_dora.adapters.surgery import adapter_layers, apply_layers
from mlx_dora.errors import DoRAError
from mlx_dora.layers import dora_class


def attach_adapter(
    model: nn.Module,
    adapter: Adapter,
    *,
    check_base: bool = True,
    name: str = "the adapter",
) -> list[str]:
    """Put an adapter onto the model it belongs to, in place.

    Args:
        model: The base, without adapters. It is frozen, but for full fine-tuning.
        adapter: What to put on it.
        check_base: Refuse a model that is not the one the adapter was trained on, as
            far as its fingerprint tells.
        name: What an error calls the adapter, such as its path.

    Returns:
        The full paths of the adapted modules (for full fine-tuning, the parameters).

    Raises:
        DoRAError: If anything does not fit; one message with all problems. The model is
            unchanged.
    """
    if problems := all_problems(model, adapter, check_base):
        raise DoRAError(f"{name} does not fit the model: {'; '.join(problems)}.")
    if adapter.fine_tune_type == "full":
        model.load_weights(list(adapter.tensors.items()), strict=False)
        return list(adapter.tensors)
    paths = adapter.paths
    config = replace(adapter.config, keys=tuple(paths))
    apply_layers(model, config, adapter.fine_tune_type, any_rank=True)
    for path, layer in adapter_layers(model):
        for leaf in LEAVES[adapter.fine_tune_type]:
            layer[leaf] = adapter.tensors[f"{path}.{leaf}"].astype(mx.float32)
        layer.train(model.training)
    return paths


def fit_problems(
    model: nn.Module, adapter: Adapter, check_base: bool = False
) -> list[str]:
    """What keeps an adapter from going onto this model; empty if nothing."""
    if adapted := adapter_layers(model):
        return [
            f"the model has {len(adapted)} adapted layers already; take them out with "
            "remove_dora first"
        ]
    problems = []
    expected = adapter.base.fingerprint
    if check_base and expected is not None and fingerprint(model) != expected:
        problems.append(other_base(adapter))
    if adapter.fine_tune_type == "full":
        return problems + _full_problems(model, adapter)
    modules = dict(model.named_modules())
    unknown = [path for path in adapter.paths if path not in modules]
    problems += listed("no such modules in the model:", unknown)
    problems += _key_problems(model, adapter)
    for path in adapter.paths:
        if path in modules:
            problems += _module_problems(adapter, path, modules[path])
    return problems


def all_problems(model: nn.Module, adapter: Adapter, check_base: bool) -> list[str]:
    """What is wrong with an adapter, as such and for this model; empty if nothing."""
    return adapter_problems(adapter) + fit_problems(model, adapter, check_base)


def other_base(adapter: Adapter) -> str:
    """The problem of an adapter whose base's fingerprint is not the model's."""
    name = adapter.base.model or "another model"
    return (
        f"it was trained on {name}, whose tensors differ from this model's (load "
        "that one, or switch the base check off if you know better)"
    )


def _key_problems(model: nn.Module, adapter: Adapter) -> list[str]:
    """The config's keys and the tensors must name the same modules.

    Without keys the tensors decide: mlx-lm up to 0.28.1 adapted a few modules of each
    block by default and recorded no keys.
    """
    config, paths = adapter.config, set(adapter.paths)
    named = paths.intersection(config.keys or ())
    others = None
    if config.keys is not None:
        others = [key for key in config.keys if key not in paths]
    if others is None or others:
        # In a folder that mlx-lm wrote, 0, -1 and more than there are all mean every
        # block.
        depth = config.num_layers or -1
        if depth > len(blocks(model)):
            depth = -1
        try:
            named.update(resolve_keys(model, others, depth))
        except DoRAError as error:
            return [str(error).rstrip(".")]
    extra = sorted(paths - named, key=natural_order)
    without = sorted(named - paths, key=natural_order) if config.keys else []
    return listed("the config does not adapt:", extra) + listed(
        "the config adapts what has no tensors:", without
    )


def _module_problems(adapter: Adapter, path: str, module: nn.Module) -> list[str]:
    if adapter.fine_tune_type == "dora":
        try:
            dora_class(module)
        except DoRAError as error:
            return [f"{path}: {str(error).rstrip('.')}"]
    lora_a = adapter.tensors.get(f"{path}.lora_a")
    if "weight" not in module or lora_a is None or lora_a.ndim not in (2, 3):
        return []
    problems = []
    for leaf, shape in _leaf_shapes(module, rank_of("lora_a", lora_a)).items():
        tensor = adapter.tensors.get(f"{path}.{leaf}")
        if tensor is not None and tensor.shape != shape:
            problems.append(
                f"{path}.{leaf} has shape {tensor.shape}; the model needs {shape}"
            )
    return problems


def _leaf_shapes(module: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter of this rank on a module, in mlx-lm's layout."""
    *experts, rows, width = module["weight"].shape
    if "scales" in module:
        width = width * 32 // module.bits
    if experts:
        return {
            "lora_a": (*experts, rank, width),
            "lora_b": (*experts, rows, rank),
            "m": (*experts, rows),
        }
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return {"lora_a": (rows, rank), "lora_b": (rank, width), "m": (rows,)}
    return {"lora_a": (width, rank), "lora_b": (rank, rows), "m": (rows,)}


def _full_problems(model: nn.Module, adapter: Adapter) -> list[str]:
    params = dict(tree_flatten(model.parameters()))
    unknown = [name for name in adapter.tensors if name not in params]
    problems = listed("no such parameters in the model:", unknown)
    for name, tensor in adapter.tensors.items():
        if name in params and params[name].shape != tensor.shape:
            problems.append(
                f"{name} has shape {tensor.shape}; the model needs {params[name].shape}"
            )
    return problems
