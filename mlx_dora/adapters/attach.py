"""Attaches an adapter from disk to a model, or reports all problems."""

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.adapter import (
    LEAVES,
    Adapter,
    adapter_problems,
    listed,
    overflow_problems,
)
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.adapters.keys import blocks, natural_order, resolve_keys
from mlx_dora.adapters.surgery import adapted_already, adapter_layers, apply_layers
from mlx_dora.errors import DoRAError
from mlx_dora.layers import dora_class
from mlx_dora.layers.layout import leaf_shapes


def attach_adapter(
    model: nn.Module,
    adapter: Adapter,
    *,
    check_base: bool = True,
    name: str = "the adapter",
) -> list[str]:
    """Attach an adapter to its base model, in place.

    Args:
        model: The base, without adapters. It is frozen, except for full fine-tuning.
        adapter: The adapter to attach.
        check_base: Refuse a model whose fingerprint differs from that of the model on
            which the adapter was trained.
        name: Name of the adapter in error messages, for example its path.

    Returns:
        The full paths of the adapted modules (for full fine-tuning, the parameters).

    Raises:
        DoRAError: If the adapter does not fit; lists all problems. The model is
            unchanged.
    """
    problems = all_problems(model, adapter, check_base) or overflow_problems(adapter)
    if problems:
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
    """Return why an adapter cannot be attached to this model; empty if it can."""
    if problem := adapted_already(model):
        return [problem]
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
    known = {path: modules[path] for path in adapter.paths if path in modules}
    return problems + _module_problems(adapter, known)


def all_problems(model: nn.Module, adapter: Adapter, check_base: bool) -> list[str]:
    """Return all problems of an adapter, its own and those with this model."""
    return adapter_problems(adapter) + fit_problems(model, adapter, check_base)


def other_base(adapter: Adapter) -> str:
    """Return the problem text for an adapter that was trained on another base."""
    name = adapter.base.model or "another model"
    return (
        f"it was trained on {name}, whose tensors differ from this model's (load that "
        "model, or disable the base check if you are sure)"
    )


def _key_problems(model: nn.Module, adapter: Adapter) -> list[str]:
    """Check that the config's keys and the tensors name the same modules.

    Without keys, the tensors decide: mlx-lm up to 0.28.1 adapted a few modules of each
    block by default and did not record keys.
    """
    config, paths = adapter.config, set(adapter.paths)
    named = paths.intersection(config.keys or ())
    others = None
    if config.keys is not None:
        others = [key for key in config.keys if key not in paths]
    if others is None or others:
        # In a folder written by mlx-lm, 0, -1 and numbers above the number of blocks
        # all mean every block.
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
        "the config adapts modules that have no tensors:", without
    )


def _module_problems(adapter: Adapter, modules: Mapping[str, nn.Module]) -> list[str]:
    """Check the class of each module, and the shapes of its tensors."""
    classes = {type(module): module for module in modules.values()}
    unfit = {}
    if adapter.fine_tune_type == "dora":
        unfit = {kind: _unfit(module) for kind, module in classes.items()}
    problems = []
    for path, module in modules.items():
        if reason := unfit.get(type(module)):
            problems.append(f"{path}: {reason}")
            continue
        lora_a = adapter.tensors.get(f"{path}.lora_a")
        if "weight" not in module or lora_a is None or lora_a.ndim not in (2, 3):
            continue
        rank = lora_a.shape[1]  # in every layout
        for leaf, shape in leaf_shapes(module, rank).items():
            tensor = adapter.tensors.get(f"{path}.{leaf}")
            if tensor is not None and tensor.shape != shape:
                problems.append(
                    f"{path}.{leaf} has shape {tensor.shape}; the model needs {shape}"
                )
    return problems


def _unfit(module: nn.Module) -> str:
    """Why no DoRA layer adapts a module; empty if there is such a layer."""
    try:
        dora_class(module)
    except DoRAError as error:
        return str(error).rstrip(".")
    return ""


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
