"""Adapter folders in mlx-lm's format, with additions of our own under ``mlx_dora``."""

import json
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
from mlx_dora.adapters.format import PARENT, config_json, pad_rank, strip_rank
from mlx_dora.adapters.hosts import warn_of_hosts
from mlx_dora.adapters.one_save import (
    CONFIG_NAME,
    TENSORS_NAME,
    identified,
    read_one_save,
    remove_unidentified,
)
from mlx_dora.adapters.surgery import FineTuneType
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import atomic_directory, write_tensors, write_text
from mlx_dora.io.output import Inputs

logger = logging.getLogger(__name__)


def save_adapter(
    model_or_adapter: nn.Module | Adapter,
    path: str | Path,
    *,
    overwrite: bool = False,
    base_model: str | None = None,
    inputs: Inputs = (),
) -> None:
    """Write an adapter folder that stock mlx-lm and Swift apps load; all or nothing.

    Warns about modules that stock mlx-lm or mlx-swift-lm cannot load, by name.

    Args:
        model_or_adapter: A model with DoRA or LoRA layers, or an `Adapter`.
        path: The folder to create.
        overwrite: Replace an existing folder.
        base_model: Path or Hub id of the base to record. A path is made absolute; of
            the newest snapshot in the Hub's cache, the Hub id is recorded.
        inputs: Files and folders that the output must not replace, contain or lie in.
            The recorded base is always included.

    Raises:
        DoRAError: If `path` must not be written, exists and `overwrite` is false, or
            the adapter holds NaN or inf or is otherwise invalid. Nothing is written.
    """
    adapter = model_or_adapter
    if not isinstance(adapter, Adapter):
        adapter = take_adapter(adapter)
    if base_model is not None:
        adapter = replace(adapter, base=replace(adapter.base, model=base_model))
    _refuse_problems(adapter, f"{path} is not written: ")
    warn_of_hosts(model_or_adapter, adapter)
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
    """Write the adapter's two files into a training folder, each atomically.

    Replaces the files of an earlier call and keeps other files in the folder.

    Args:
        model_or_adapter: A model in training, or an `Adapter`.
        folder: The training folder; created if missing.
        fine_tune_type: Required for ``"full"``; see `take_adapter`.
        base: The base to record. Pass it to avoid computing the fingerprint at each
            call; for full fine-tuning, compute it before training.
        training: Summary to record.
        warn: Warn about modules that other hosts cannot load.

    Raises:
        DoRAError: If the adapter holds NaN or inf; the files are unchanged.
    """
    adapter = model_or_adapter
    if not isinstance(adapter, Adapter):
        adapter = take_adapter(
            adapter, fine_tune_type=fine_tune_type, base=base, training=training
        )
    adapter = replace(
        adapter,
        base=base or adapter.base,
        training=adapter.training if training is None else training,
    )
    _refuse_problems(adapter, f"{folder} is unchanged: ")
    if warn:
        warn_of_hosts(model_or_adapter, adapter)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_files(adapter, folder)


def load_adapter(path: str | Path) -> Adapter:
    """Read and check an adapter folder of mlx_dora or mlx-lm.

    Args:
        path: A folder with ``adapter_config.json`` and ``adapters.safetensors``.

    Raises:
        DoRAError: If the folder, its config or its tensors are invalid; lists all
            problems.
    """
    adapter = read_adapter(path)
    _refuse_problems(adapter, f"{path}: ")
    return adapter


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter folder without checking its tensors' values and names.

    `attach_adapter` checks them later against the model.
    """
    adapter, tensors = read_one_save(Path(path))
    if adapter.base.model == PARENT:
        base = replace(adapter.base, model=str(Path(path).resolve().parent))
        adapter = replace(adapter, base=base)
    return replace(adapter, tensors=strip_rank(tensors, adapter.config))


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
    content, metadata = identified(config_json(adapter), tensors)
    remove_unidentified(folder)
    # Tensors first: a folder with a config is a folder with an adapter.
    write_tensors(folder / TENSORS_NAME, tensors, metadata)
    write_text(folder / CONFIG_NAME, json.dumps(content, indent=4))
