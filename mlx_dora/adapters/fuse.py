"""An adapted model as a plain one, in memory and as a folder that mlx-lm loads."""

import copy
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.fuse_report import FuseReport, describe_fused
from mlx_dora.adapters.hosting import load_with_config, model_folder
from mlx_dora.adapters.surgery import adapter_layers, dora_layers, put_modules
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import atomic_directory, check_output
from mlx_dora.io.checkpoint import MAX_SHARD_BYTES, ShardWriter

logger = logging.getLogger(__name__)


def fuse_dora(model: nn.Module, dequantize: bool = False) -> FuseReport:
    """Put the adapters into the weights, in place: a plain model is left.

    A dense layer keeps its dtype and size; the adapted weight is rounded once, and an
    untrained adapter changes no bit. A packed base is packed again with its own bits,
    which loses part of a small update: the report says how much of each layer's, and a
    warning is logged.

    Args:
        model: A model with DoRA layers.
        dequantize: Make the whole model dense instead, as ``mlx_lm.fuse --dequantize``
            does: nothing of the update is lost but one rounding.

    Raises:
        DoRAError: If the model has no DoRA layers, or LoRA layers.
    """
    layers = dora_layers(model)
    others = len(adapter_layers(model)) - len(layers)
    if others:
        raise DoRAError(
            f"the model has {others} of mlx-lm's own adapter layers; fuse a LoRA "
            "adapter with mlx_lm.fuse."
        )
    if not layers:
        raise DoRAError("the model has no DoRA layers to fuse.")
    fused = []
    for path, layer in layers:
        module = layer.fuse(dequantize=dequantize)
        mx.eval(module.parameters())
        fused.append(describe_fused(path, layer, module))
        put_modules(model, [(path, module)])
    if dequantize and any("scales" in module for module in model.modules()):
        from mlx_lm.utils import dequantize_model

        dequantize_model(model)
    report = FuseReport(layers=tuple(fused))
    if report.lossy:
        worst = min(report.lossy, key=lambda layer: layer.cosine or 0.0)
        logger.warning(
            "packing again lost part of the update in %d of %d layers (%s: %.0f %% of "
            "it kept, cosine %.2f); fuse with dequantize, or use the adapter unfused",
            len(report.lossy),
            len(report.layers),
            worst.path,
            100 * (worst.kept or 0.0),
            worst.cosine or 0.0,
        )
    return report


def fuse_model(
    model: str | Path,
    adapter_path: str | Path,
    save_path: str | Path,
    *,
    dequantize: bool = False,
    overwrite: bool = False,
    check_base: bool = True,
    trust_remote_code: bool = False,
) -> FuseReport:
    """Load a model with its DoRA adapter, fuse, and write the result as a folder.

    Args:
        model: A local model folder, or a Hub id.
        adapter_path: The adapter.
        save_path: The folder to make.
        dequantize: Make the whole model dense; see `fuse_dora`.
        overwrite: Replace an existing folder.
        check_base: Refuse an adapter that was trained on another model.
        trust_remote_code: Run Python code that the model's folder brings along.

    Raises:
        DoRAError: If the model or adapter cannot be loaded or do not fit, or the output
            exists.
    """
    check_output(save_path, overwrite=overwrite)
    folder = model_folder(model)
    _keep_inputs(save_path, folder, Path(adapter_path))
    loaded, tokenizer, config = load_with_config(
        folder,
        adapter_path,
        lazy=True,
        check_base=check_base,
        trust_remote_code=trust_remote_code,
    )
    report = fuse_dora(loaded, dequantize=dequantize)
    save_fused(loaded, tokenizer, folder, save_path, config=config, overwrite=overwrite)
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
    """Write a fused model, its config and tokenizer, complete or not at all.

    Args:
        model: A model without adapters.
        tokenizer: mlx-lm's tokenizer wrapper.
        source: The folder or Hub id the base came from: its config (if `config` is not
            given), generation config and Python files are taken over.
        save_path: The folder to make.
        config: The config mlx-lm loaded the base with.
        overwrite: Replace an existing folder.
        max_shard_bytes: Size of the weight files.

    Raises:
        DoRAError: If `save_path` exists and `overwrite` is false, would replace the
            base itself, or the model has adapters left.
    """
    from mlx_lm.utils import load_config, save_config

    if adapted := adapter_layers(model):
        raise DoRAError(f"{adapted[0][0]} is still adapted; fuse the model first.")
    check_output(save_path, overwrite=overwrite)
    folder = model_folder(source)
    _keep_inputs(save_path, folder)
    content = copy.deepcopy(dict(load_config(folder) if config is None else config))
    if not any("scales" in module for module in model.modules()):
        for level in (content, content.get("text_config")):
            if isinstance(level, dict):
                level.pop("quantization", None)
                level.pop("quantization_config", None)
    has_vision = "vision_tower" in getattr(model, "model", {})
    with atomic_directory(save_path, overwrite=overwrite) as out:
        with ShardWriter(out, max_shard_bytes=max_shard_bytes) as writer:
            for name, value in tree_flatten(model.parameters()):
                writer.add(name, cast(mx.array, value))
        save_config(content, out / "config.json", keep_vision_config=has_vision)
        tokenizer.save_pretrained(str(out))
        for pattern in ("generation_config.json", "*.py"):
            for file in folder.glob(pattern):
                shutil.copyfile(file, out / file.name)


def _keep_inputs(save_path: str | Path, *inputs: Path) -> None:
    target = Path(save_path).resolve()
    for path in inputs:
        if path.resolve().is_relative_to(target):
            raise DoRAError(
                f"{save_path} holds the input {path}; choose another output."
            )
