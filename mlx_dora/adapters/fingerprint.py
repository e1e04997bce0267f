"""Identifies a base model by its tensors, to refuse adapters of other models."""

import hashlib
import json
from collections.abc import Callable
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_dora.adapters.keys import natural_order
from mlx_dora.adapters.origins import Origins, origins_of
from mlx_dora.adapters.surgery import adapter_layers, base_of

# Number of sampled tensors, and of values sampled from each.
_SAMPLED_TENSORS = 16
_SAMPLED_VALUES = 256
_REMEMBERED = "_mlx_dora_fingerprint"


def fingerprint(model: nn.Module) -> str:
    """Hash the base's tensor names, shapes and dtypes, and a sample of its values.

    Adapters do not affect the hash: it is the same before and after `apply_dora` and
    with mlx-lm's LoRA layers. At most 16 matrices are read, whatever the model's size.
    Models that differ only in other values have the same fingerprint.

    Returns:
        ``"sha256:"`` and 64 hexadecimal digits.
    """
    known = getattr(model, _REMEMBERED, None)
    if isinstance(known, str):
        return known
    return fingerprint_of(base_tensors(model), origins_of(model))


def remember_fingerprint(model: nn.Module, value: str) -> None:
    """Record the fingerprint of a model before its weights are divided."""
    setattr(model, _REMEMBERED, value)


def fingerprint_of(tensors: dict[str, mx.array], origins: Origins | None = None) -> str:
    """Return the fingerprint of a base's tensors; removes sampled ones from `tensors`.

    Of tensors that are still in their files, only the sampled values are read. Of
    others, if nothing else refers to them, one is in memory at a time.

    Args:
        tensors: The tensors by name.
        origins: Where they are stored, if they were read lazily.
    """
    lines = {name: tensor_line(name, tensor) for name, tensor in tensors.items()}
    return digest_of(lines, lambda name: sample_of(tensors.pop(name), origins))


def digest_of(lines: dict[str, bytes], sample: Callable[[str], bytes]) -> str:
    """Hash the lines of all tensors and samples of some of them.

    Args:
        lines: Result of `tensor_line`, by tensor name.
        sample: Maps a tensor's name to the result of `sample_of`.
    """
    names = sorted(lines, key=natural_order)
    digest = hashlib.sha256()
    for name in names:
        digest.update(lines[name])
    matrices = [name for name in names if _is_matrix(lines[name])]
    for name in _spread(matrices, _SAMPLED_TENSORS):
        digest.update(sample(name))
    return f"sha256:{digest.hexdigest()}"


def tensor_line(name: str, tensor: mx.array) -> bytes:
    """Return name, shape and dtype as a line."""
    line = [name, list(tensor.shape), str(tensor.dtype)]
    return json.dumps(line).encode() + b"\n"


def _is_matrix(line: bytes) -> bool:
    shape = json.loads(line)[1]
    return len(shape) > 1 and 0 not in shape


def base_tensors(model: nn.Module) -> dict[str, mx.array]:
    """Return the base's parameters by the names that they have without adapters."""
    adapted = adapter_layers(model)
    prefixes = tuple(f"{path}." for path, _ in adapted)
    tensors: dict[str, mx.array] = {
        name: cast(mx.array, tensor)
        for name, tensor in tree_flatten(model.parameters())
        if not name.startswith(prefixes)
    }
    for path, layer in adapted:
        for name, tensor in tree_flatten(base_of(layer).parameters()):
            tensors[f"{path}.{name}"] = cast(mx.array, tensor)
    return tensors


def _spread(names: list[str], count: int) -> list[str]:
    """Return `count` evenly spaced names, including the first and the last."""
    if len(names) <= count:
        return names
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def sample_of(tensor: mx.array, origins: Origins | None = None) -> bytes:
    """Return up to 256 evenly spaced values as bytes; from its file if it is there."""
    step = max(1, tensor.size // _SAMPLED_VALUES)
    stored = None if origins is None else origins.stored(tensor)
    if stored is not None:
        return stored.every(step, _SAMPLED_VALUES)
    values = mx.contiguous(tensor.reshape(-1)[::step][:_SAMPLED_VALUES])
    return np.array(values.view(mx.uint8)).tobytes()
