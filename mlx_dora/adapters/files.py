"""Adapter folders in mlx-lm's format, with what it leaves out under ``mlx_dora``."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import (
    Adapter,
    BaseModel,
    adapter_problems,
    take_adapter,
)
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.format import config_json, pad_rank, strip_rank
from mlx_dora.adapters.one_save import (
    read_one_save,
    write_one_save,
)
from mlx_dora.adapters.surgery import FineTuneType, base_of, dora_layers
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import atomic_directory
from mlx_dora.io.output import Inputs

__all__ = [
    "Adapter",
    "BaseModel",
    "attach_adapter",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "write_adapter_files",
]

logger = logging.getLogger(__name__)


def save_adapter(
    model_or_adapter: nn.Module | Adapter,
    path: str | Path,
    *,
    overwrite: bool = False,
    base_model: str | None = None,
    inputs: Inputs = (),
) -> None:
    """Write an adapter folder that stock mlx-lm loads, complete or not at all.

    A warning names the modules that stock mlx-lm cannot load.

    Args:
        model_or_adapter: A model with DoRA or LoRA layers, or an `Adapter`.
        path: The folder to make.
        overwrite: Replace an existing folder.
        base_model: Path or Hub id of the base, to be recorded.
        inputs: Files and folders that the output must not replace, hold or lie in. The
            base that is recorded is never replaced.

    Raises:
        DoRAError: If `path` must not be written, exists and `overwrite` is false, or
            the adapter has NaN or inf or is otherwise unfit; nothing is written then.
    """
    adapter = _adapter_of(model_or_adapter)
    if base_model is not None:
        adapter = replace(adapter, base=replace(adapter.base, model=base_model))
    _refuse_problems(adapter, f"{path} is not written: ")
    _warn_of_stock(model_or_adapter, adapter)
    if overwrite:
        inputs = (*inputs, adapter.base.model)
    with atomic_directory(path, inputs=inputs, overwrite=overwrite) as folder:
        _write_files(adapter, folder)


def write_adapter_files(
    model_or_adapter: nn.Module | Adapter,
    folder: str | Path,
    *,
    fine_tune_type: FineTuneType | None = None,
    base: BaseModel | None = None,
    training: Mapping[str, Any] | None = None,
    warn: bool = True,
) -> None:
    """Write the adapter's two files into a living training folder, each at once.

    The files of an earlier call are replaced; others in the folder stay.

    Args:
        model_or_adapter: A model in training, or an `Adapter`.
        folder: Made if missing.
        fine_tune_type: Must be given for ``"full"``; see `take_adapter`.
        base: What to record of the base; taking its fingerprint once spares doing so
            at each call, and for full fine-tuning must be done before training.
        training: Summary to record.
        warn: Name the modules that stock mlx-lm cannot load.

    Raises:
        DoRAError: If the adapter has NaN or inf: the files stay as they were.
    """
    if isinstance(model_or_adapter, Adapter):
        adapter = model_or_adapter
        if base is not None or training is not None:
            adapter = replace(
                adapter,
                base=base or adapter.base,
                training=training if training is not None else adapter.training,
            )
    else:
        adapter = take_adapter(
            model_or_adapter,
            fine_tune_type=fine_tune_type,
            base=base,
            training=training,
        )
    _refuse_problems(adapter, f"{folder} is left as it was: ")
    if warn:
        _warn_of_stock(model_or_adapter, adapter)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_files(adapter, folder)


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter folder of ours or of mlx-lm, strictly.

    Args:
        path: A folder with ``adapter_config.json`` and ``adapters.safetensors``.

    Raises:
        DoRAError: If the folder, its config or its tensors are not in order; one
            message with all problems.
    """
    adapter = read_adapter(path)
    _refuse_problems(adapter, f"{path}: ")
    return adapter


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter folder without checking its tensors' values and names.

    For `attach_adapter`, which checks them together with what the model needs.
    """
    adapter, tensors = read_one_save(Path(path))
    return replace(adapter, tensors=strip_rank(tensors, adapter.config))


def _adapter_of(model_or_adapter: nn.Module | Adapter) -> Adapter:
    if isinstance(model_or_adapter, Adapter):
        return model_or_adapter
    return take_adapter(model_or_adapter)


def _refuse_problems(adapter: Adapter, before: str) -> None:
    if problems := adapter_problems(adapter):
        raise DoRAError(f"{before}{'; '.join(problems)}.")


def _write_files(adapter: Adapter, folder: Path) -> None:
    tensors = adapter.tensors
    if adapter.fine_tune_type != "full":
        tensors = {
            name: pad_rank(name, value.astype(mx.float32), adapter.config.rank)
            for name, value in tensors.items()
        }
    write_one_save(folder, config_json(adapter), tensors)


def _warn_of_stock(model_or_adapter: nn.Module | Adapter, adapter: Adapter) -> None:
    """Say by name what stock mlx-lm cannot load of this adapter."""
    if adapter.fine_tune_type != "dora":
        return
    reasons: dict[str, list[str]] = {}
    for name, value in adapter.tensors.items():
        # A row of the base that is zero has m = 0, and training leaves it there.
        if name.endswith(".m") and mx.any(value == 0):
            reasons.setdefault("zero rows (it computes NaN)", []).append(name[:-2])
        if name.endswith(".m") and value.ndim > 1:
            stacks = reasons.setdefault("experts or heads of latent attention", [])
            stacks.append(name[:-2])
    if isinstance(model_or_adapter, nn.Module):
        for path, layer in dora_layers(model_or_adapter):
            base = base_of(layer)
            if isinstance(base, nn.QuantizedEmbedding):
                reasons.setdefault("quantised embeddings", []).append(path)
            elif isinstance(base, nn.QuantizedLinear) and base.bits in (3, 5, 6):
                reasons.setdefault("3-, 5- or 6-bit bases", []).append(path)
    for reason, paths in reasons.items():
        logger.warning(
            "stock mlx-lm cannot run DoRA on %s; use mlx_dora.load or use_in_mlx_lm "
            "for: %s",
            reason,
            ", ".join(paths),
        )
