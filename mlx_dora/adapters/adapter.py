"""An adapter away from its model: config, tensors, and which base it belongs to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.adapters.keys import blocks, natural_order, shortened
from mlx_dora.adapters.surgery import FineTuneType, exported_layers
from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRALayer

LEAVES = {"dora": ("lora_a", "lora_b", "m"), "lora": ("lora_a", "lora_b")}

# Names of one kind of problem that a message spells out.


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model an adapter was trained on.

    Attributes:
        model: The path or Hub id it was loaded from, as the user wrote it.
        fingerprint: See `mlx_dora.adapters.fingerprint`; None if unknown.
    """

    model: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What an adapter folder holds.

    Attributes:
        config: How the model is adapted; the keys are full module paths (those of a
            folder written by mlx-lm stay as it wrote them).
        tensors: ``<module path>.lora_a``, ``.lora_b``, ``.m`` to arrays, at each
            module's true rank. For full fine-tuning, parameter names to values.
        base: The model it belongs to.
        fine_tune_type: ``"dora"``, ``"lora"`` or ``"full"``.
        training: Summary of the training that made it, as JSON values.
    """

    config: DoRAConfig
    tensors: dict[str, mx.array]
    base: BaseModel = field(default_factory=BaseModel)
    fine_tune_type: FineTuneType = "dora"
    training: Mapping[str, Any] | None = None

    @property
    def paths(self) -> list[str]:
        """The adapted modules, in natural order."""
        paths = {name.rpartition(".")[0] for name in self.tensors}
        return sorted(paths, key=natural_order)


def take_adapter(
    model: nn.Module,
    *,
    fine_tune_type: FineTuneType | None = None,
    base: BaseModel | None = None,
    training: Mapping[str, Any] | None = None,
) -> Adapter:
    """Return the adapter that is in a model, sharing its arrays.

    Scales that differ by module are folded into ``lora_b``, since stock mlx-lm reads
    one scale. A variant gives the plain DoRA adapter that computes the same.

    Args:
        model: A model with DoRA or LoRA layers; for full fine-tuning, one with
            trainable parameters.
        fine_tune_type: Must be given for ``"full"``; otherwise read off the layers.
        base: What to record of the base; its fingerprint is taken now if None (of a
            fully fine-tuned model it cannot be).
        training: Summary to record.

    Raises:
        DoRAError: If there is nothing to take, DoRA and LoRA are mixed, a variant is
            where no DoRA adapter can follow, or the norms of a layer are not finite:
            it computes nothing of use, though its values may be numbers.
    """
    if fine_tune_type == "full":
        return _take_full(model, base or BaseModel(), training)
    layers = exported_layers(model)
    if not layers:
        raise DoRAError("the model has no adapted layers (see apply_dora).")
    kinds = {"m" in layer for _, layer in layers}
    if len(kinds) > 1:
        raise DoRAError("the model has both DoRA and LoRA layers.")
    kind: FineTuneType = "dora" if kinds.pop() else "lora"
    scale = max((float(layer.scale) for _, layer in layers), key=abs)
    tensors: dict[str, mx.array] = {}
    ranks = {}
    for path, layer in layers:
        if isinstance(layer, DoRALayer) and not mx.isfinite(layer.norm()).all():
            raise DoRAError(
                f"{path}: the norms of the adapted rows are not finite: the base holds "
                "NaN or inf, or the adapter's values have grown too large (lower the "
                "learning rate or the scale)."
            )
        for leaf in LEAVES[kind]:
            value = layer[leaf].astype(mx.float32)
            if leaf == "lora_b" and layer.scale != scale:
                value = value * (layer.scale / scale)
            tensors[f"{path}.{leaf}"] = value
        ranks[path] = rank_of("lora_a", layer["lora_a"])
    rank = max(ranks.values())
    # nn.Dropout keeps 1 - p.
    kept = min(layer.dropout._p_1 for _, layer in layers)
    config = DoRAConfig(
        rank=rank,
        scale=scale,
        dropout=round(1 - kept, 9),
        keys=tuple(ranks),
        num_layers=_covering_blocks(model, ranks),
        # All of them: a pattern also fits longer paths that end like it.
        rank_pattern=ranks if len(set(ranks.values())) > 1 else None,
    )
    return Adapter(
        config=config,
        tensors=tensors,
        base=base or BaseModel(fingerprint=fingerprint(model)),
        fine_tune_type=kind,
        training=training,
    )


def _take_full(
    model: nn.Module, base: BaseModel, training: Mapping[str, Any] | None
) -> Adapter:
    flat = tree_flatten(model.trainable_parameters())
    tensors = {name: cast(mx.array, value) for name, value in flat}
    if not tensors:
        raise DoRAError("the model has no trainable parameters to save.")
    return Adapter(
        config=DoRAConfig(num_layers=_covering_blocks(model, tensors)),
        tensors=tensors,
        base=base,
        fine_tune_type="full",
        training=training,
    )


def _covering_blocks(model: nn.Module, names: Iterable[str]) -> int:
    """How many of the last blocks are needed to cover all modules inside blocks."""
    found = [path for path, _ in blocks(model)]
    names = tuple(names)
    for i, path in enumerate(found):
        if any(name == path or name.startswith(f"{path}.") for name in names):
            return len(found) - i
    return 0


def rank_axis(leaf: str, ndim: int) -> int:
    """The axis of the rank; experts (three axes) keep it elsewhere, as in mlx-lm."""
    if leaf == "lora_a":
        return 1
    return 0 if ndim == 2 else 2


def rank_of(leaf: str, tensor: mx.array) -> int:
    """The rank of a low-rank factor."""
    return tensor.shape[rank_axis(leaf, tensor.ndim)]


def adapter_problems(adapter: Adapter) -> list[str]:
    """What is wrong with an adapter as such, whatever the model; empty if nothing."""
    tensors = adapter.tensors
    if not tensors:
        return ["it holds no tensors"]
    problems = listed(
        "NaN or inf in",
        (name for name, is_finite in _finite(tensors).items() if not is_finite),
    )
    if adapter.fine_tune_type == "full":
        return problems
    leaves = LEAVES[adapter.fine_tune_type]
    strange = [name for name in tensors if name.rpartition(".")[2] not in leaves]
    problems += listed(f"not {adapter.fine_tune_type} parameters:", strange)
    paths = dict.fromkeys(
        name.rpartition(".")[0] for name in tensors if name not in strange
    )
    missing = [
        f"{p}.{leaf}" for p in paths for leaf in leaves if f"{p}.{leaf}" not in tensors
    ]
    problems += listed("missing:", missing)
    for path in paths:
        problems += _rank_problems(adapter, path)
    return problems


def _rank_problems(adapter: Adapter, path: str) -> list[str]:
    expected = adapter.config.rank_of(path)
    problems = []
    for leaf in ("lora_a", "lora_b"):
        tensor = adapter.tensors.get(f"{path}.{leaf}")
        if tensor is None:
            continue
        if tensor.ndim not in (2, 3):
            problems.append(f"{path}.{leaf} has shape {tensor.shape}, not a matrix")
        elif rank_of(leaf, tensor) != expected:
            problems.append(
                f"{path}.{leaf} has shape {tensor.shape} and so rank "
                f"{rank_of(leaf, tensor)}; the config says {expected}"
            )
    return problems


def _finite(tensors: Mapping[str, mx.array]) -> dict[str, bool]:
    """Whether each tensor of floats is free of NaN and inf, in one evaluation."""
    flags = {
        name: mx.isfinite(tensor).all()
        for name, tensor in tensors.items()
        if mx.issubdtype(tensor.dtype, mx.floating)
    }
    mx.eval(flags)
    return {name: bool(flag) for name, flag in flags.items()}


def listed(what: str, names: Iterable[str]) -> list[str]:
    """One problem that names up to ten tensors, or none."""
    names = list(names)
    return [f"{what} {shortened(names)}"] if names else []
