"""Measures one model on one task: loss, label accuracy, continuations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.nn as nn

from mlx_dora.data.dataset import Dataset
from mlx_dora.data.loading import make_datasets
from mlx_dora.data.splits import read_splits
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.config import EvaluateConfig
from mlx_dora.evaluate.generation import Prompt, generate_samples, sample_prompts
from mlx_dora.evaluate.labels import LabelAccuracy, find_labels, label_accuracy
from mlx_dora.evaluate.loss import LossResult, evaluate_loss
from mlx_dora.progress import Progress


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """Results of one model.

    Args:
        name: Name of the model, such as ``"base"``.
        loss: Loss on the data.
        labels: Label accuracy; None if the answers are not labels.
        samples: Continuations of the prompts.
    """

    name: str
    loss: LossResult
    labels: LabelAccuracy | None
    samples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows on which models are measured.

    Args:
        split: ``"train"``, ``"valid"`` or ``"test"``.
        dataset: The rows.
        prompts: Prompts that each model continues.
        labels: The distinct answers, if they are labels and are to be ranked.
    """

    split: str
    dataset: Dataset
    prompts: list[Prompt]
    labels: tuple[str, ...] | None


def read_task(config: EvaluateConfig) -> tuple[str, dict[str, Any]]:
    """Read the rows of the split to evaluate: test if it exists, else valid.

    Returns:
        The name of the split, and its rows by split.

    Raises:
        DoRAError: If the data cannot be read or has no such split.
    """
    wanted = [config.split] if config.split else ["test", "valid"]
    for name in wanted:
        splits = read_splits(config, [name])
        if splits[name]:
            return name, splits
    raise DoRAError(f"{config.data} has no {' or '.join(wanted)} data.")


def open_task(
    read: tuple[str, dict[str, Any]], tokenizer: Any, config: EvaluateConfig
) -> Task:
    """Tokenize the rows of `read_task`, and choose the prompts to continue.

    Raises:
        DoRAError: If a row is malformed.
    """
    split, rows = read
    data = make_datasets(rows, tokenizer)[split]
    assert data is not None
    return Task(
        split=split,
        dataset=data,
        prompts=sample_prompts(
            data, tokenizer, config.samples, max_tokens=config.max_seq_length
        ),
        labels=find_labels(data) if config.labels else None,
    )


def measure_model(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    config: EvaluateConfig,
    progress: Progress | None,
) -> ModelResult:
    """Measure a model, loaded and adapted, on a task.

    Raises:
        DoRAError: If no row has a target, or no row with a label fits.
    """
    data, labels = task.dataset, task.labels
    rows = len(data)
    if config.num_batches != -1:
        rows = min(rows, config.num_batches * config.batch_size)

    def reporter(what: str) -> Callable[[int], None] | None:
        return None if progress is None else partial(progress, f"{name}: {what}", rows)

    loss = evaluate_loss(
        model,
        data,
        batch_size=config.batch_size,
        max_seq_length=config.max_seq_length,
        num_batches=config.num_batches,
        progress=reporter("loss"),
    )
    accuracy = None
    if labels is not None:
        accuracy = label_accuracy(
            model,
            data,
            labels,
            batch_size=config.batch_size,
            max_seq_length=config.max_seq_length,
            num_rows=rows,
            progress=reporter("labels"),
        )
    texts = generate_samples(
        model, tokenizer, task.prompts, max_tokens=config.max_tokens
    )
    return ModelResult(name=name, loss=loss, labels=accuracy, samples=tuple(texts))
