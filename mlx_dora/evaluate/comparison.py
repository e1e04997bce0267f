"""Compares a base, an adapter and a fused model on the same data."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.files import read_adapter
from mlx_dora.adapters.hosting import load, model_folder
from mlx_dora.adapters.recorded_base import recorded_base
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.agreement import Agreement, compare_probe, take_probe
from mlx_dora.evaluate.config import EvaluateConfig
from mlx_dora.evaluate.generation import Prompt
from mlx_dora.evaluate.measure import (
    ModelResult,
    measure_model,
    open_task,
    read_task,
)
from mlx_dora.notebook import Shown
from mlx_dora.progress import Progress


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Shown):
    """Results of several models on one split of a data set.

    Args:
        split: ``"train"``, ``"valid"`` or ``"test"``.
        results: One result per requested model, in the order base, adapter, fused.
        prompts: The prompts that the models continued.
        agreement: Comparison of the fused model's logits with the adapter's.
    """

    split: str
    results: tuple[ModelResult, ...]
    prompts: tuple[Prompt, ...]
    agreement: Agreement | None

    def facts(self) -> dict[str, Any]:
        """Return the split and each model's loss."""
        losses = {result.name: result.loss.loss for result in self.results}
        return {"split": self.split, **losses}

    def table(self) -> list[dict[str, Any]]:
        """Return the models."""
        return [
            {
                "model": result.name,
                "loss": result.loss.loss,
                "perplexity": result.loss.perplexity,
                "accuracy": result.labels and result.labels.accuracy,
            }
            for result in self.results
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        values = asdict(self)
        for entry, result in zip(values["results"], self.results, strict=True):
            entry["loss"]["perplexity"] = result.loss.perplexity
        values["prompts"] = [
            {"text": prompt.text, "expected": prompt.expected}
            for prompt in self.prompts
        ]
        return values


def compare_models(
    config: EvaluateConfig, progress: Progress | None = None
) -> Comparison:
    """Evaluate a base, the base with an adapter, and a fused model in turn.

    Only one model is in memory at a time.

    Args:
        config: Models, data and extent of the evaluation.
        progress: Called after each batch.

    Raises:
        DoRAError: If a model, the adapter or the data cannot be used.
    """
    adapter = None if config.adapter_path is None else read_adapter(config.adapter_path)
    if config.fused_path is not None:
        model_folder(config.fused_path)
    read = read_task(config)
    if (name := config.model) is None:
        if config.adapter_path is None:
            raise DoRAError("model is not given: name a folder or a Hugging Face id.")
        name = recorded_base(config.adapter_path)
    model, tokenizer = load(name, trust_remote_code=config.trust_remote_code)
    task = open_task(read, tokenizer, config)

    def measure(name: str, model: nn.Module) -> ModelResult:
        return measure_model(name, model, tokenizer, task, config, progress)

    results = [measure("base", model)]
    probe = None
    if adapter is not None:
        attach_adapter(model, adapter, name=str(config.adapter_path))
        model.eval()
        results.append(measure("adapter", model))
        if config.fused_path is not None:
            length = min(config.max_seq_length, 256)
            probe = take_probe(model, task.dataset, max_seq_length=length)
    agreement = None
    if config.fused_path is not None:
        del model
        mx.clear_cache()
        fused, _ = load(
            Path(config.fused_path), trust_remote_code=config.trust_remote_code
        )
        results.append(measure("fused", fused))
        agreement = compare_probe(fused, probe) if probe is not None else None
    return Comparison(
        split=task.split,
        results=tuple(results),
        prompts=tuple(task.prompts),
        agreement=agreement,
    )
