"""Measures a base and several adapters, merged or not, on several tasks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.files import read_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.labels import short_names
from mlx_dora.adapters.recorded_base import recorded_base
from mlx_dora.adapters.surgery import remove_dora
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.config import EvaluateConfig
from mlx_dora.evaluate.generation import Prompt
from mlx_dora.evaluate.measure import ModelResult, measure_model, open_task, read_task
from mlx_dora.notebook import Shown
from mlx_dora.progress import Progress

BASE = "base"
"""Name of the base among the models."""


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """The results of every model on one task.

    Attributes:
        name: Short name of the data set.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        prompts: The prompts that the models continued.
        results: One result per model: the base, then the adapters in order.
    """

    name: str
    split: str
    prompts: tuple[Prompt, ...]
    results: tuple[ModelResult, ...]

    @property
    def base(self) -> float:
        """The base's loss."""
        return self.results[0].loss.loss

    @property
    def has_labels(self) -> bool:
        """Whether the answers are labels."""
        return self.results[0].labels is not None

    @property
    def best(self) -> int:
        """Index of the model with the least loss; the first among equals."""
        losses = [result.loss.loss for result in self.results]
        return losses.index(min(losses))


@dataclass(frozen=True, kw_only=True, repr=False)
class TaskTable(Shown):
    """Losses of a base and of adapters, by task.

    Attributes:
        models: Names of the models: ``"base"``, and short names of the adapters.
        tasks: The results of each task.
    """

    models: tuple[str, ...]
    tasks: tuple[TaskResults, ...]

    def losses(self, model: int) -> list[float]:
        """Return the losses of a model on each task."""
        return [task.results[model].loss.loss for task in self.tasks]

    def mean(self, model: int) -> float:
        """Return the mean of a model's losses over the tasks."""
        return sum(self.losses(model)) / len(self.tasks)

    @property
    def worse(self) -> list[tuple[int, int]]:
        """Pairs (model, task) where an adapter's loss is above the base's."""
        return [
            (model, place)
            for model in range(1, len(self.models))
            for place, task in enumerate(self.tasks)
            if task.results[model].loss.loss > task.base
        ]

    def facts(self) -> dict[str, Any]:
        """Return the numbers of models and tasks, and each model's mean loss."""
        means = {name: self.mean(i) for i, name in enumerate(self.models)}
        return {"tasks": len(self.tasks), "mean loss": means}

    def table(self) -> list[dict[str, Any]]:
        """Return the models, with the loss on each task and the mean."""
        return [
            {
                "model": name,
                **{
                    task.name: loss
                    for task, loss in zip(self.tasks, self.losses(i), strict=True)
                },
                "mean": self.mean(i),
            }
            for i, name in enumerate(self.models)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        tasks = []
        for task in self.tasks:
            results = [asdict(result) for result in task.results]
            for entry, result in zip(results, task.results, strict=True):
                entry["loss"]["perplexity"] = result.loss.perplexity
                entry["change"] = result.loss.loss - task.base
            prompts = [{"text": p.text, "expected": p.expected} for p in task.prompts]
            tasks.append(
                {
                    "name": task.name,
                    "split": task.split,
                    "prompts": prompts,
                    "results": results,
                }
            )
        return {
            "kind": "tasks",
            "models": list(self.models),
            "tasks": tasks,
            "mean_loss": [self.mean(i) for i in range(len(self.models))],
            "above_base": [
                {"model": self.models[model], "task": self.tasks[place].name}
                for model, place in self.worse
            ],
        }


def evaluate_tasks(
    config: EvaluateConfig,
    *,
    adapters: Sequence[str],
    data: Sequence[str],
    progress: Progress | None = None,
) -> TaskTable:
    """Measure the base and each adapter on each task.

    The base is loaded once, and one adapter at a time is attached to it.

    Args:
        config: The base (None for the one that the first adapter records), and the
            extent of the evaluation. Its adapter, fused model and data are ignored.
        adapters: Folders of adapters of the base.
        data: The data set of each task.
        progress: Called after each batch.

    Raises:
        DoRAError: If the base, an adapter or a data set cannot be used.
    """
    if not data or (config.model is None and not adapters):
        raise DoRAError("give at least one data set, and a model or an adapter.")
    loaded = [read_adapter(path) for path in adapters]
    configs = [replace(config, data=name) for name in data]
    read = [read_task(one) for one in configs]
    name = config.model or recorded_base(adapters[0])
    model, tokenizer = load(name, trust_remote_code=config.trust_remote_code)
    tasks = [
        open_task(rows, tokenizer, one) for rows, one in zip(read, configs, strict=True)
    ]
    models = [BASE, *short_names(adapters)]
    labels = short_names(data)
    columns: list[list[ModelResult]] = []
    for index, label in enumerate(models):
        adapter = loaded[index - 1] if index else None
        if adapter is not None:
            attach_adapter(model, adapter, name=adapters[index - 1])
            model.eval()
        columns.append(
            [
                measure_model(label, model, tokenizer, task, one, progress)
                for task, one in zip(tasks, configs, strict=True)
            ]
        )
        if adapter is not None and adapter.fine_tune_type == "full":
            del model  # its weights were replaced
            mx.clear_cache()
            model, _ = load(name, trust_remote_code=config.trust_remote_code)
        elif adapter is not None:
            remove_dora(model)
    return TaskTable(
        models=tuple(models),
        tasks=tuple(
            TaskResults(
                name=label,
                split=task.split,
                prompts=tuple(task.prompts),
                results=tuple(column[place] for column in columns),
            )
            for place, (label, task) in enumerate(zip(labels, tasks, strict=True))
        ),
    )
