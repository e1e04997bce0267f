"""Converts adapter folders to plain LoRA, in mlx-lm's format or as GGUF."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load, model_folder
from mlx_dora.adapters.surgery import remove_dora
from mlx_dora.data.batches import Examples
from mlx_dora.data.config import DataConfig
from mlx_dora.data.loading import make_datasets
from mlx_dora.data.splits import read_splits
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import evaluate_loss
from mlx_dora.export.gguf_adapter import GGUFAdapter, check_gguf, to_gguf
from mlx_dora.export.plain_lora import (
    DEFAULT_RANK,
    ConvertedLoss,
    LoRAConversion,
    to_lora,
)
from mlx_dora.io.atomic import check_output
from mlx_dora.progress import Progress


def convert_to_lora(
    source: str | Path,
    target: str | Path,
    *,
    model: str | Path,
    rank: int = DEFAULT_RANK,
    data: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LoRAConversion:
    """Convert an adapter folder to a LoRA adapter folder of mlx-lm's format.

    Args:
        source: A DoRA or LoRA adapter folder.
        target: The folder to create.
        model: The base: a local folder or Hub id.
        rank: Rank of the LoRA.
        data: A data set, as for training, on which to measure losses: its test split,
            or else valid or train.
        base_model: Name of the base to record; None for the one that `source` records.
        overwrite: Replace an existing folder.
        progress: Called after each module and batch.

    Raises:
        DoRAError: As `to_lora`; if `target` exists; or if the data cannot be read.
    """
    inputs = (source, model)
    check_output(target, inputs=inputs, overwrite=overwrite)
    made = _converted(load_adapter(source), model, rank, data, progress)
    save_adapter(
        made.adapter, target, base_model=base_model, inputs=inputs, overwrite=overwrite
    )
    return made


def convert_to_gguf(
    source: str | Path,
    target: str | Path,
    *,
    model: str | Path,
    rank: int = DEFAULT_RANK,
    data: str | None = None,
    base_gguf: str = "base.gguf",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[LoRAConversion, GGUFAdapter]:
    """Convert an adapter folder to a folder with a GGUF adapter and a Modelfile.

    A DoRA adapter becomes the nearest LoRA first (`to_lora`); a LoRA adapter of at most
    `rank` is written as it is.

    Args:
        source: A DoRA or LoRA adapter folder.
        target: The folder to create.
        model: The base: a local folder or Hub id.
        rank: Largest rank of the LoRA.
        data: A data set on which to measure losses, as for `convert_to_lora`.
        base_gguf: The base in the Modelfile: a GGUF file or a model of Ollama.
        overwrite: Replace an existing folder.
        progress: Called after each module and batch.

    Raises:
        DoRAError: As `to_lora` and `to_gguf`.
    """
    inputs = (source, model)
    check_output(target, inputs=inputs, overwrite=overwrite)
    adapter, folder = load_adapter(source), model_folder(model)
    check_gguf(adapter, folder)
    made = _converted(adapter, model, rank, data, progress)
    written = to_gguf(
        made.adapter,
        target,
        model_folder=folder,
        base_gguf=base_gguf,
        overwrite=overwrite,
        inputs=inputs,
    )
    return made, written


def _converted(
    adapter: Adapter,
    model: str | Path,
    rank: int,
    data: str | None,
    progress: Progress | None,
) -> LoRAConversion:
    base, tokenizer = load(model, lazy=True)
    rows = None if data is None else _rows(data, tokenizer)
    made = to_lora(adapter, base, rank, progress=progress)
    if rows is not None:
        losses = _losses(base, (None, adapter, made.adapter), rows, progress)
        made = replace(made, loss=losses)
    return made


def _rows(data: str, tokenizer: Any) -> Examples:
    sets = make_datasets(read_splits(DataConfig(data=data)), tokenizer)
    rows = sets["test"] or sets["valid"] or sets["train"]
    if rows is None:
        raise DoRAError(f"{data} has no rows: expected a test, valid or train split.")
    return rows


def _losses(
    model: nn.Module,
    adapters: Sequence[Adapter | None],
    rows: Examples,
    progress: Progress | None,
) -> ConvertedLoss:
    """Measure the loss with each adapter in turn; None is the base."""
    values = []
    for adapter in adapters:
        if adapter is not None:
            attach_adapter(model, adapter, check_base=False)
        report = None if progress is None else partial(progress, "loss", len(rows))
        values.append(evaluate_loss(model, rows, progress=report).loss)
        remove_dora(model)
    base, original, lora = values
    return ConvertedLoss(base=base, adapter=original, lora=lora)
