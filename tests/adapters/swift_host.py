"""The rules by which mlx-swift-lm loads an adapter folder, applied in Python.

Written from mlx-swift-lm, commit 1441444 of August 2026 (``LoRAContainer.swift``:
`from(directory:)`, `load(into:)`, `replaceLayers`) and mlx-swift 0.31.6
(``Module.swift``: `update(parameters:verify:)` with `.noUnusedKeys`; ``Nested.swift``:
`unflattened`).
The model is mlx-lm's: Swift's classes have the same module names.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

LINEARS = (nn.Linear, nn.QuantizedLinear)  # in Swift, QuantizedLinear is a Linear
LEAVES = {"dora": ("lora_a", "lora_b", "m"), "lora": ("lora_a", "lora_b")}


class SwiftError(Exception):
    """What `LoRAContainer` throws, or what stops the program."""


@dataclass(frozen=True)
class Loaded:
    """Names of tensors that were put into the model, and of those left as created."""

    used: list[str]
    unset: list[str]


def swift_load(model: nn.Module, folder: Path) -> Loaded:
    """Load an adapter folder as Swift would; the model is not changed."""
    config = decoded(json.loads((folder / "adapter_config.json").read_text()))
    weights = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(weights, dict)
    layers: list[nn.Module] = list(model.layers or ())
    # Array.suffix: a negative length stops the program, a large one takes all.
    if config["num_layers"] < 0:
        raise SwiftError("Can't take a suffix of negative length")
    count = min(config["num_layers"], len(layers))
    chosen = {id(layer) for layer in layers[len(layers) - count :]}
    keys = config["keys"]
    replaced: dict[str, nn.Module] = {}
    for path, layer in model.named_modules():
        if id(layer) not in chosen:
            continue
        for name, child in layer.named_modules():
            is_linear = isinstance(child, LINEARS)
            if is_linear and (keys is None or name in keys):
                replaced[f"{path}.{name}"] = child
    slots = {
        f"{path}.{leaf}": shape
        for path, child in replaced.items()
        for leaf, shape in shapes(child, config).items()
    }
    unused = sorted(weights.keys() - slots.keys())
    if unused:
        raise SwiftError(f"Unhandled keys {unused} of {len(weights)}")
    # Swift does not compare shapes here: another shape fails in the first product.
    wrong = [name for name in weights if weights[name].shape != slots[name]]
    if wrong:
        raise SwiftError(f"shapes of {wrong}")
    return Loaded(sorted(weights), sorted(slots.keys() - weights.keys()))


def decoded(content: Any) -> dict[str, Any]:
    """Decode `LoRAConfiguration`; a missing key or another type is an error."""
    kind = content.get("fine_tune_type")
    if kind not in LEAVES:
        raise SwiftError(f"fine_tune_type {kind!r}")
    parameters = content.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise SwiftError("lora_parameters")
    if type(content.get("num_layers")) is not int:
        raise SwiftError("num_layers")
    if type(parameters.get("rank")) is not int:
        raise SwiftError("rank")
    if type(parameters.get("scale")) not in (int, float):
        raise SwiftError("scale")
    dropout = parameters.get("dropout") or 0.0
    if not 0 <= dropout < 1:
        raise SwiftError("dropout")
    keys = parameters.get("keys")
    if keys is not None and not all(isinstance(key, str) for key in keys):
        raise SwiftError("keys")
    return {
        "kind": kind,
        "num_layers": content["num_layers"],
        "rank": parameters["rank"],
        "keys": keys,
    }


def shapes(linear: nn.Module, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that Swift's layer has for a linear layer."""
    weight: mx.array = linear["weight"]
    out, width = weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        width = width * 32 // linear.bits  # QuantizedLinear.shape
    rank = config["rank"]
    every = {"lora_a": (width, rank), "lora_b": (rank, out), "m": (out,)}
    return {leaf: every[leaf] for leaf in LEAVES[config["kind"]]}
