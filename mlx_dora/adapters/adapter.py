"""An adapter apart from its model: config, tensors and the base it belongs to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.adapters.key_form import key_form, with_key_form
from mlx_dora.adapters.keys import natural_order, shortened
from mlx_dora.adapters.surgery import FineTuneType, exported_layers
from mlx_dora.errors import DoRAError
from mlx_dora.io.finite import not_finite
from mlx_dora.layers import DoRALayer
from mlx_dora.notebook import Shown

_LARGEST = 1e18
"""Numbers below it can be squared and summed in float32."""

LEAVES = {"dora": ("lora_a", "lora_b", "m"), "lora": ("lora_a", "lora_b")}


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model an adapter was trained on.

    Attributes:
        model: The path or Hub id from which it was loaded, as the user wrote it; in
            files, a path is absolute.
        fingerprint: Hash of the model (`mlx_dora.adapters.fingerprint`), or None.
    """

    model: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Adapter(Shown):
    """The content of an adapter folder.

    Attributes:
        config: How the model is adapted. The keys are those of the file: names relative
            to each of the last ``num_layers`` blocks, or full module paths; `paths` has
            the full paths in any case.
        tensors: Arrays by ``<module path>.lora_a``, ``.lora_b`` and ``.m``, with each
            module's true rank. For full fine-tuning, values by parameter name.
        base: The model that the adapter belongs to.
        fine_tune_type: ``"dora"``, ``"lora"`` or ``"full"``.
        training: Summary of the training that made the adapter, as JSON values.
    """

    config: DoRAConfig
    tensors: dict[str, mx.array]
    base: BaseModel = field(default_factory=BaseModel)
    fine_tune_type: FineTuneType = "dora"
    training: Mapping[str, Any] | None = None

    @cached_property
    def paths(self) -> list[str]:
        """Paths of the adapted modules, in natural order."""
        paths = {name.rpartition(".")[0] for name in self.tensors}
        return sorted(paths, key=natural_order)

    def facts(self) -> dict[str, Any]:
        """Return kind, rank, scale, sizes and base."""
        return {
            "fine_tune_type": self.fine_tune_type,
            "rank": self.config.rank,
            "scale": self.config.scale,
            "modules": len(self.paths),
            "parameters": sum(tensor.size for tensor in self.tensors.values()),
            "base": self.base.model,
        }

    def table(self) -> list[dict[str, Any]]:
        """Return the tensors in natural order."""
        return [
            {"tensor": name, "shape": tuple(self.tensors[name].shape)}
            for name in sorted(self.tensors, key=natural_order)
        ]


_SOURCE = "_mlx_dora_source"


def remember_source(model: nn.Module, name: str) -> None:
    """Let adapters taken from a model record the path or Hub id it was loaded from."""
    setattr(model, _SOURCE, name)


def _base_of(model: nn.Module) -> BaseModel:
    name = getattr(model, _SOURCE, None)
    return BaseModel(model=name, fingerprint=fingerprint(model))


def take_adapter(
    model: nn.Module,
    *,
    fine_tune_type: FineTuneType | None = None,
    base: BaseModel | None = None,
    training: Mapping[str, Any] | None = None,
) -> Adapter:
    """Return the adapter in a model; the arrays are shared.

    Scales that differ between modules are folded into ``lora_b``, because stock mlx-lm
    reads a single scale. A variant becomes the equivalent plain DoRA adapter.

    Args:
        model: A model with DoRA or LoRA layers or, for full fine-tuning, with trainable
            parameters.
        fine_tune_type: Required for ``"full"``; otherwise derived from the layers.
        base: The base to record; if None, its name is that given to `load`, and its
            fingerprint is computed now, which is impossible for a fully fine-tuned
            model.
        training: Summary to record.

    Raises:
        DoRAError: If the model has no adapter, DoRA and LoRA are mixed, a variant has
            no equivalent DoRA adapter, or the norms of a layer are not finite, which
            makes its output useless even if its values are finite.
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
    ranks = ranks_in(tensors)
    # nn.Dropout stores 1 - p.
    kept = min(layer.dropout._p_1 for _, layer in layers)
    config = DoRAConfig(scale=scale, dropout=round(1 - kept, 9)).with_ranks(ranks)
    return Adapter(
        config=with_key_form(config, model),
        tensors=tensors,
        base=base or _base_of(model),
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
        config=DoRAConfig(num_layers=key_form(model, tuple(tensors)).num_layers),
        tensors=tensors,
        base=base,
        fine_tune_type="full",
        training=training,
    )


def rank_axis(leaf: str, ndim: int) -> int:
    """Return the axis of the rank, which differs for experts (three axes) in mlx-lm."""
    if leaf == "lora_a":
        return 1
    return 0 if ndim == 2 else 2


def rank_of(leaf: str, tensor: mx.array) -> int:
    """Return the rank of a low-rank factor."""
    return tensor.shape[rank_axis(leaf, tensor.ndim)]


def ranks_in(tensors: Mapping[str, mx.array]) -> dict[str, int]:
    """Return the rank of each module from an adapter's tensors."""
    axis, leaf = rank_axis("lora_a", 2), ".lora_a"
    return {
        name.removesuffix(leaf): tensor.shape[axis]
        for name, tensor in tensors.items()
        if name.endswith(leaf)
    }


def adapter_problems(adapter: Adapter) -> list[str]:
    """Return the problems of an adapter that do not depend on a model."""
    tensors = adapter.tensors
    if not tensors:
        return ["it holds no tensors"]
    problems = listed("NaN or inf in", not_finite(tensors))
    if adapter.fine_tune_type == "full":
        return problems
    leaves = LEAVES[adapter.fine_tune_type]
    strange = [name for name in tensors if name.rpartition(".")[2] not in leaves]
    problems += listed(f"not {adapter.fine_tune_type} parameters:", strange)
    paths = dict.fromkeys(
        [name.rpartition(".")[0] for name in tensors if name not in strange]
    )
    missing = [
        f"{p}.{leaf}" for p in paths for leaf in leaves if f"{p}.{leaf}" not in tensors
    ]
    problems += listed("missing:", missing)
    return problems + _rank_problems(adapter, paths)


def overflow_problems(adapter: Adapter) -> list[str]:
    """What a layer could not compute in float32; empty if nothing.

    A layer squares row norms of W0 + s·BA. No entry of s·BA exceeds
    |s|·r·max|A|·max|B|, so that bound must stay below the root of float32's greatest
    value, and so must the magnitudes.
    """
    beyond = []
    for path in adapter.paths:
        sizes = {
            leaf: float(mx.abs(adapter.tensors[f"{path}.{leaf}"]).max())
            for leaf in LEAVES.get(adapter.fine_tune_type, ())
            if adapter.tensors[f"{path}.{leaf}"].size
        }
        entry = abs(adapter.config.scale_of(path)) * adapter.config.rank_of(path)
        entry *= sizes.get("lora_a", 0.0) * sizes.get("lora_b", 0.0)
        if max(entry, sizes.get("m", 0.0)) > _LARGEST:
            beyond.append(path)
    return listed("values too large to compute with in float32 in", beyond)


def _rank_problems(adapter: Adapter, paths: Iterable[str]) -> list[str]:
    axes = {
        (leaf, ndim): rank_axis(leaf, ndim)
        for leaf in ("lora_a", "lora_b")
        for ndim in (2, 3)
    }
    expected = adapter.config.ranks_of(paths)
    problems = []
    for name, tensor in adapter.tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in ("lora_a", "lora_b"):
            continue
        axis = axes.get((leaf, tensor.ndim))
        if axis is None:
            problems.append(f"{name} has shape {tensor.shape}, not a matrix")
        elif tensor.shape[axis] != expected[path]:
            problems.append(
                f"{name} has shape {tensor.shape} and so rank {tensor.shape[axis]}; "
                f"the config says {expected[path]}"
            )
    return problems


def listed(what: str, names: Iterable[str]) -> list[str]:
    """Return a problem that names up to ten tensors, or [] if there are no names."""
    names = list(names)
    return [f"{what} {shortened(names)}"] if names else []
