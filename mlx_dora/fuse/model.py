"""Fuses adapters into a model, in memory or to a folder that mlx-lm loads."""

import copy
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import fit_problems, other_base
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.fingerprint import base_tensors, fingerprint_of
from mlx_dora.adapters.format import PARENT
from mlx_dora.adapters.hosting import load_lazily, load_with_config, model_folder
from mlx_dora.adapters.origins import origins_of
from mlx_dora.adapters.recorded_base import recorded_base
from mlx_dora.adapters.surgery import (
    adapter_layers,
    dora_layers,
    export_variants,
    put_modules,
)
from mlx_dora.errors import DoRAError
from mlx_dora.fuse.carried import carried_along, carried_tensors
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.layer import survival
from mlx_dora.fuse.report import FusedLayer, FuseReport, sum_survivals
from mlx_dora.fuse.stream import model_dtype, stream_fused
from mlx_dora.io.atomic import atomic_directory, check_output
from mlx_dora.io.checkpoint import MAX_SHARD_BYTES, ShardWriter
from mlx_dora.io.finite import all_finite
from mlx_dora.io.foreign import foreign
from mlx_dora.io.output import check_room
from mlx_dora.layers import DoRALayer, fused_module, weight_of
from mlx_dora.matrix.weight import as_packed, dense_dtype, matrices
from mlx_dora.progress import Progress

REST_NAME = "adapter"
"""Folder in a losslessly fused model that holds the low-rank part."""

_TRAVELLING = (
    "*.json",
    "*.jinja",
    "*.py",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "LICENSE*",
)
"""Files of the base that a fuse copies unless it writes a file of the same name:
processor settings, templates, vocabularies, code and the license."""
_REPLACED = ("config.json", "adapter_config.json", "hf_quant_config.json")
"""Files that are not copied, because they would contradict the fused model."""

logger = logging.getLogger(__name__)


def fuse_dora(model: nn.Module, dequantize: bool = False) -> FuseReport:
    """Merge the adapters into the weights in place, which leaves a plain model.

    A dense layer keeps its dtype and size. The adapted weight is rounded once, and an
    untrained adapter changes no bit. A packed base is repacked with its own bits, which
    loses part of a small update. The report says how much of each layer's update is
    kept, and losses are logged as a warning.

    Args:
        model: A model with DoRA layers.
        dequantize: Make the whole model dense instead, like ``mlx_lm.fuse
            --dequantize``. The update is then only rounded once.

    Raises:
        DoRAError: If the model has no DoRA layers or has LoRA layers, or if an adapted
            weight is not finite. In the last case, earlier layers are already fused.
    """
    layers = dora_layers(model)
    others = len(adapter_layers(model)) - len(layers)
    if others:
        raise DoRAError(
            f"the model has {others} adapter layers of mlx-lm; fuse a LoRA adapter "
            "from its folder, with mlx_dora.fuse (or mlx_lm.fuse)."
        )
    if not layers:
        raise DoRAError("the model has no DoRA layers to fuse.")
    export_variants(model)
    fused, own = [], model_dtype(model)
    for path, layer in dora_layers(model):
        try:
            module = fused_module(
                layer.base,
                layer.adapted().matrices(),
                layer.base_types()[0],
                dequantize,
                own,
            )
        except DoRAError as error:
            raise DoRAError(f"{path}: {error}") from error
        mx.eval(module.parameters())
        fused.append(_describe(path, layer, module))
        put_modules(model, [(path, module)])
    if dequantize and any("scales" in module for module in model.modules()):
        from mlx_lm.utils import dequantize_model

        bytes_scaled = [
            path for path, module in model.named_modules() if _has_byte_scales(module)
        ]
        dequantize_model(model)
        modules = dict(model.named_modules())
        for path in bytes_scaled:
            modules[path].weight = modules[path].weight.astype(own)
    report = FuseReport(layers=tuple(fused))
    _warn_of_loss(report)
    return report


def _has_byte_scales(module: nn.Module) -> bool:
    return "scales" in module and "biases" not in module


def _warn_of_loss(report: FuseReport) -> None:
    if not report.lossy:
        return
    worst = min(report.lossy, key=lambda layer: layer.cosine)
    logger.warning(
        "repacking lost part of the update in %d of %d layers (%s: %.0f %% kept, "
        "cosine %.2f); fuse with lossless or dequantize, or use the adapter "
        "unfused",
        len(report.lossy),
        len(report.layers),
        worst.path,
        100 * worst.kept,
        worst.cosine,
    )


def fuse_model(
    model: str | Path | None,
    adapter_path: str | Path,
    save_path: str | Path,
    *,
    config: FuseConfig | None = None,
    overwrite: bool = False,
    check_base: bool = True,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> FuseReport:
    """Fuse an adapter into its base and write the result as a folder.

    The adapter may be DoRA, LoRA or full fine-tuning, made by this package or mlx-lm.

    The base is read, fused and written one tensor at a time, in float32 with one
    rounding. A dense layer keeps its dtype. Tensors that mlx-lm's text model drops (a
    vision tower, a projector) are copied unchanged. `FuseConfig` selects how packed
    layers are fused. A lossless fuse writes the low-rank part as a LoRA adapter to the
    subfolder ``adapter``. Layers that need more bits are listed in the model's config.

    Args:
        model: A local model folder or a Hub id; None for the base that the adapter
            records.
        adapter_path: Folder of the adapter.
        save_path: Folder to create.
        config: How to fuse packed weights.
        overwrite: Replace an existing folder.
        check_base: Refuse an adapter that was trained on another model.
        trust_remote_code: Allow Python code in the model's folder to run.
        max_shard_bytes: Greatest size of a weight file.
        progress: Called after each module.

    Raises:
        DoRAError: If the model or adapter cannot be loaded or do not fit, or the output
            exists.
    """
    config = config or FuseConfig()
    given = (model, adapter_path)
    check_output(save_path, inputs=given, overwrite=overwrite)
    adapter = load_adapter(adapter_path)
    folder = model_folder(recorded_base(adapter_path) if model is None else model)
    _check_fit(folder, adapter, adapter_path, check_base, trust_remote_code)
    base, tokenizer, content = load_with_config(
        folder, lazy=True, trust_remote_code=trust_remote_code
    )
    packing = content.get("quantization") if config.mode == "dequantize" else None
    content = _plain_config(content, config.mode == "dequantize")
    carried = carried_along(folder, trust_remote_code=trust_remote_code)
    has_vision = _has_vision(base) or not carried.left_out
    inputs = (folder, *given)
    check_room(save_path, _bytes_of(base))
    with atomic_directory(save_path, inputs=inputs, overwrite=overwrite) as out:
        with ShardWriter(out, max_shard_bytes=max_shard_bytes) as writer:
            fused = stream_fused(base, adapter, config, writer.add_blocks, progress)
            for name, value in carried_tensors(folder, carried, packing):
                writer.add(name, value)
        if fused.packing:
            content["quantization"] |= fused.packing
        if fused.rest is not None:
            save_adapter(fused.rest, out / REST_NAME, base_model=PARENT)
        _write_rest(out, content, tokenizer, folder, has_vision)
    carried.warn()
    report = FuseReport(layers=fused.layers)
    _warn_of_loss(report)
    return report


def save_fused(
    model: nn.Module,
    tokenizer: Any,
    source: str | Path,
    save_path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model fused in memory, with config and tokenizer, all or nothing.

    Args:
        model: A model without adapters.
        tokenizer: mlx-lm's tokenizer wrapper.
        source: Folder or Hub id of the base. Its config (if `config` is None), its
            other files and the tensors that mlx-lm's model drops are copied.
        save_path: Folder to create.
        config: Config with which mlx-lm loaded the base.
        overwrite: Replace an existing folder.
        max_shard_bytes: Greatest size of a weight file.

    Raises:
        DoRAError: If `save_path` exists and `overwrite` is false, if it would replace
            the base, or if the model still has adapters.
    """
    from mlx_lm.utils import load_config

    if adapted := adapter_layers(model):
        raise DoRAError(f"{adapted[0][0]} is still adapted; fuse the model first.")
    check_output(save_path, inputs=(source,), overwrite=overwrite)
    folder = model_folder(source)
    is_dense = not any("scales" in module for module in model.modules())
    if config is None:
        with foreign(folder):
            config = load_config(folder)
    content = dict(config)
    packing = content.get("quantization") if is_dense else None
    content = _plain_config(content, is_dense)
    # The model is already loaded, so that its custom code has run.
    is_custom = type(model).__module__ == "custom_model"
    carried = carried_along(folder, trust_remote_code=is_custom)
    has_vision = _has_vision(model) or not carried.left_out
    check_room(save_path, _bytes_of(model))
    with atomic_directory(save_path, inputs=(folder,), overwrite=overwrite) as out:
        with ShardWriter(out, max_shard_bytes=max_shard_bytes) as writer:
            for name, value in tree_flatten(model.parameters()):
                if not all_finite(cast(mx.array, value)):
                    raise DoRAError(f"{name} holds NaN or inf: nothing is written.")
                writer.add(name, cast(mx.array, value))
            for name, value in carried_tensors(folder, carried, packing):
                writer.add(name, value)
        _write_rest(out, content, tokenizer, folder, has_vision)
    carried.warn()


def _bytes_of(model: nn.Module) -> int:
    """Return the least size of a fused model, without reading a tensor.

    Scales and biases of packed weights may get another dtype, so they do not count.
    """
    tensors = tree_flatten(model.parameters())
    kept = [v for name, v in tensors if not name.endswith((".scales", ".biases"))]
    return sum(cast(mx.array, value).nbytes for value in kept)


def _check_fit(
    folder: Path,
    adapter: Adapter,
    adapter_path: str | Path,
    check_base: bool,
    trust_remote_code: bool,
) -> None:
    """Make the checks of `attach_adapter`, holding one tensor at a time."""
    model = load_lazily(folder, trust_remote_code=trust_remote_code)
    problems = fit_problems(model, adapter)
    tensors, origins = base_tensors(model), origins_of(model)
    del model
    expected = adapter.base.fingerprint
    is_checked = check_base and expected is not None
    if is_checked and fingerprint_of(tensors, origins) != expected:
        problems.append(other_base(adapter))
    if problems:
        raise DoRAError(
            f"{adapter_path} does not fit the model: {'; '.join(problems)}."
        )


def _describe(path: str, layer: DoRALayer, module: nn.Module) -> FusedLayer:
    """Compare a DoRA layer with its fused, plain module."""
    before, after = weight_of(layer.base), weight_of(module)
    adapted = layer.adapted().matrices()
    survivals = [
        survival(*parts)
        for parts in zip(matrices(before), matrices(after), adapted, strict=True)
    ]
    packed = as_packed(after)
    return FusedLayer(
        path=path,
        dtype=str(dense_dtype(after)).rpartition(".")[2],
        bits=None if packed is None else packed.bits,
        bytes_before=_nbytes(layer.base),
        bytes_after=_nbytes(module),
        survival=sum_survivals(survivals),
    )


def _nbytes(module: nn.Module) -> int:
    values = [cast(mx.array, value) for _, value in tree_flatten(module.parameters())]
    return sum(value.nbytes for value in values)


def _has_vision(model: nn.Module) -> bool:
    return "vision_tower" in getattr(model, "model", {})


def _plain_config(config: Mapping[str, Any], is_dense: bool) -> dict[str, Any]:
    content = copy.deepcopy(dict(config))
    if is_dense:
        for level in (content, content.get("text_config")):
            if isinstance(level, dict):
                level.pop("quantization", None)
                level.pop("quantization_config", None)
    return content


def _write_rest(
    out: Path, content: dict[str, Any], tokenizer: Any, source: Path, has_vision: bool
) -> None:
    """Write all files but the weights; the config last, because loading needs it."""
    from mlx_lm.utils import save_config

    tokenizer.save_pretrained(str(out))
    for pattern in _TRAVELLING:
        for file in sorted(source.glob(pattern)):
            is_theirs = file.name in _REPLACED or file.name.endswith(".index.json")
            if file.is_file() and not is_theirs and not (out / file.name).exists():
                shutil.copyfile(file, out / file.name)
    save_config(content, out / "config.json", keep_vision_config=has_vision)
