"""Fuses a model tensor by tensor, and frees each tensor once it is written."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.adapter import Adapter, BaseModel
from mlx_dora.adapters.fingerprint import digest_of, sample_of, tensor_line
from mlx_dora.adapters.key_form import with_key_form
from mlx_dora.adapters.keys import takes_lora
from mlx_dora.adapters.matrices import adapted_matrices, adapter_tensors
from mlx_dora.adapters.origins import Origins, origins_of
from mlx_dora.errors import DoRAError
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.full import replace_parts
from mlx_dora.fuse.layer import why_not_finite
from mlx_dora.fuse.matrices import fuse_matrices
from mlx_dora.fuse.report import FusedLayer
from mlx_dora.io.finite import all_finite
from mlx_dora.layers import DoRALayer
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.weight import (
    as_packed,
    dense,
    dense_dtype,
    unpacked_dtype,
    weight_from,
)
from mlx_dora.progress import Progress

Parts = dict[str, mx.array]
"""The arrays of a module by name."""

Write = Callable[[str, mx.Dtype, tuple[int, ...], Iterable[mx.array]], None]

_BLOCK = 1 << 21  # elements of a tensor that is only copied, read at a time
_WEIGHT = ("weight", "scales", "biases")


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Results of fusing a model besides its tensors.

    Attributes:
        layers: The fused layers.
        packing: Entries for the config, by module: its packing, or False if dense.
        rest: LoRA adapter for a losslessly fused model, or None.
    """

    layers: tuple[FusedLayer, ...]
    packing: dict[str, dict[str, Any] | bool]
    rest: Adapter | None


def stream_fused(
    model: nn.Module,
    adapter: Adapter,
    config: FuseConfig,
    write: Write,
    progress: Progress | None = None,
) -> Fused:
    """Fuse a lazily loaded model, module by module, and consume it.

    Args:
        model: The base, not evaluated; its parameters are removed.
        adapter: A DoRA, LoRA or full fine-tuning adapter that fits the base.
        config: How to fuse packed weights.
        write: Called with the name, dtype, shape and blocks of each tensor; see
            `ShardWriter.add_blocks`.
        progress: Called after each module.

    Raises:
        DoRAError: If a lossless fuse is impossible, because scales cannot hold
            magnitudes, mlx-lm has no LoRA layer for the low-rank part, or the adapter
            is a LoRA adapter, which has no magnitudes; or if a tensor of the base or
            the result holds NaN or inf.
    """
    modules = dict(model.named_modules())
    is_full = adapter.fine_tune_type == "full"
    adapted = set() if is_full else set(adapter.paths)
    if config.mode == "lossless":
        _check_lossless(adapter, {path: modules[path] for path in sorted(adapted)})
    layers: list[FusedLayer] = []
    packing: dict[str, dict[str, Any] | bool] = {}
    rest: Parts = {}
    seen, own, origins = _Fingerprint(), model_dtype(model), origins_of(model)
    for count, path, parts in _taken_out(model):
        module = modules[path]
        if is_full:
            layers += replace_parts(path, parts, adapter.tensors)
        if path in adapted:
            result = _fuse_module(path, module, parts, adapter, config, own)
            layers.append(result.layer)
            rest |= result.rest
            if result.packing is not None:
                packing[path] = result.packing
            parts.clear()
            parts |= result.parts
            del result
        elif config.mode == "dequantize" and "scales" in parts:
            weight = weight_from(parts, module)
            full = dense(weight).astype(unpacked_dtype(weight, own))
            del weight
            parts = {"weight": full, **_others(parts)}
            del full
        while parts:
            leaf = next(iter(parts))
            name = f"{path}.{leaf}" if path else leaf
            if path in adapted and leaf in _WEIGHT:  # checked already
                blocks = iter([parts[leaf]])
            else:
                blocks = _finite_blocks(name, parts[leaf], origins)
            write(name, parts[leaf].dtype, parts[leaf].shape, blocks)
            if config.mode == "lossless":
                seen.add(name, parts[leaf], origins)
            del parts[leaf], blocks
        if progress is not None:
            progress("fuse", count, 1)
    beside = None
    if rest:
        beside = _rest_adapter(model, adapter, rest, seen.digest())
    return Fused(layers=tuple(layers), packing=packing, rest=beside)


def _finite_blocks(name: str, tensor: mx.array, origins: Origins) -> Iterator[mx.array]:
    """Yield a tensor to copy: a block of its file at a time if it was not changed.

    Raises:
        DoRAError: If the tensor holds NaN or inf.
    """
    stored = origins.stored(tensor)
    if stored is None:
        blocks: Iterable[mx.array] = [tensor]
    else:
        flat = stored.reshape(-1)
        starts = range(0, flat.size, _BLOCK)
        blocks = (flat[start : start + _BLOCK] for start in starts)
    for block in blocks:
        if not all_finite(block):
            raise DoRAError(f"{name} of the base holds NaN or inf.")
        yield block


def model_dtype(model: nn.Module) -> mx.Dtype:
    """Return the most common float dtype of a model, without packed weights or DoRA."""
    sizes: dict[mx.Dtype, int] = {}
    for module in model.modules():
        if isinstance(module, DoRALayer):
            continue
        for leaf, value in module.items():
            is_packed = "scales" in module and leaf in _WEIGHT
            if not isinstance(value, mx.array) or is_packed:
                continue
            if mx.issubdtype(value.dtype, mx.floating):
                sizes[value.dtype] = sizes.get(value.dtype, 0) + value.size
    return max(sizes, key=lambda dtype: sizes[dtype], default=mx.bfloat16)


def _check_lossless(adapter: Adapter, adapted: Mapping[str, nn.Module]) -> None:
    packed = {path: module for path, module in adapted.items() if "scales" in module}
    if packed and adapter.fine_tune_type == "lora":
        raise DoRAError(
            "a LoRA adapter has no magnitudes that a lossless fuse could multiply into "
            "the scales: the result would be the base and the same adapter. Fuse with "
            "requantize or dequantize, or use the adapter unfused."
        )
    if beyond := [path for path, module in packed.items() if not takes_lora(module)]:
        raise DoRAError(
            f"mlx-lm has no LoRA layer for {', '.join(beyond)} to hold the low-rank "
            "part of a lossless fuse; fuse with requantize or dequantize."
        )


@dataclass
class _Fingerprint:
    """Computes the fingerprint of a model from its tensors, one at a time."""

    lines: dict[str, bytes] = field(default_factory=dict)
    samples: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, tensor: mx.array, origins: Origins) -> None:
        self.lines[name] = tensor_line(name, tensor)
        if tensor.ndim > 1 and tensor.size:
            self.samples[name] = sample_of(tensor, origins)

    def digest(self) -> str:
        return digest_of(self.lines, self.samples.__getitem__)


@dataclass(frozen=True, kw_only=True)
class _Result:
    parts: Parts
    layer: FusedLayer
    packing: dict[str, Any] | bool | None
    rest: Parts


def _fuse_module(
    path: str,
    module: nn.Module,
    parts: Parts,
    adapter: Adapter,
    config: FuseConfig,
    own: mx.Dtype,
) -> _Result:
    weight = weight_from(parts, module)
    result = fuse_matrices(weight, adapted_matrices(adapter, path, module), config, own)
    after, packing = result.weight, None
    before, packed = as_packed(weight), as_packed(after)
    new = {"weight": cast(mx.array, after)} if packed is None else packed.parts
    # A dense weight was compared with its base, which shows any NaN or inf.
    is_checked = before is None or all(map(all_finite, new.values()))
    if not is_checked or not result.is_finite:
        raise DoRAError(f"{path}: {why_not_finite(weight)}")
    if before is not None and config.mode == "requantize":
        packing = _packing(before, packed)
    rest: Parts = {}
    if result.rest:
        rest = adapter_tensors(path, module, weight, result.rest)
    fused = new | _others(parts)
    layer = FusedLayer(
        path=path,
        dtype=str(dense_dtype(after)).rpartition(".")[2],
        bits=None if packed is None else packed.bits,
        bytes_before=sum(value.nbytes for value in parts.values()),
        bytes_after=sum(value.nbytes for value in (fused | rest).values()),
        survival=result.survival,
        plain=result.plain,
    )
    return _Result(parts=fused, layer=layer, packing=packing, rest=rest)


def _taken_out(model: nn.Module) -> Iterator[tuple[int, str, Parts]]:
    """Yield the number of modules, and each one's arrays, which leave the model."""
    names = [name for name, _ in tree_flatten(model.parameters())]
    modules = dict(model.named_modules())
    owners: dict[str, list[str]] = {}
    for name in names:
        owner = name.rpartition(".")[0]
        while owner not in modules:  # arrays in a list or dict of a module
            owner = owner.rpartition(".")[0]
        owners.setdefault(owner, []).append(name[len(owner) + 1 if owner else 0 :])
    for path, leaves in owners.items():
        module = modules[path]
        flat = dict(tree_flatten(module.parameters()))
        parts = {leaf: cast(mx.array, flat[leaf]) for leaf in leaves}
        for leaf in leaves:
            module.pop(leaf.partition(".")[0], None)
        del flat
        yield len(owners), path, parts


def _others(parts: Parts) -> Parts:
    return {leaf: value for leaf, value in parts.items() if leaf not in _WEIGHT}


def _packing(
    before: QuantizedWeight, after: QuantizedWeight | None
) -> dict[str, Any] | bool | None:
    """Return the config entry of a weight with a new packing, or None if unchanged."""
    if after is None:
        return False
    return None if after.form == before.form else after.form


def _rest_adapter(
    model: nn.Module, adapter: Adapter, rest: Parts, fingerprint: str
) -> Adapter:
    paths = dict.fromkeys(name.rpartition(".")[0] for name in rest)
    config = adapter.config.with_ranks(adapter.config.ranks_of(paths))
    return Adapter(
        config=with_key_form(config, model),
        tensors=rest,
        base=BaseModel(fingerprint=fingerprint),
        fine_tune_type="lora",
        training=adapter.training,
    )
