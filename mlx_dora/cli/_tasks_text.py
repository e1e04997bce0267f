"""The table of models and tasks of ``mlx_dora.evaluate``, as text."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_dora.evaluate.measure import ModelResult
    from mlx_dora.evaluate.tasks import TaskResults, TaskTable

Quote = Callable[[str, str], list[str]]
"""Formats a label and a text as lines."""


def describe_tasks(table: "TaskTable", quote: Quote) -> list[str]:
    """Format the losses, the accuracies and the samples as lines of text."""
    lines: list[str] = []
    for task in table.tasks:
        loss = task.results[0].loss
        lines.append(
            f"{task.name}: {task.split} data, {loss.rows} rows, {loss.tokens:,} "
            "target tokens"
        )
        for count, what in (
            (loss.rows_truncated, "cut to max_seq_length"),
            (loss.rows_skipped, "skipped, without a target token"),
        ):
            if count:
                lines.append(f"  {count} rows {what}")
    means = [f"{table.mean(i):.4f}" for i in range(len(table.models))]
    lines += ["", *_grid("loss", table, table.tasks, _loss, {"mean": means})]
    if labeled := [task for task in table.tasks if task.has_labels]:
        lines += ["", *_grid("accuracy", table, labeled, _accuracy, {})]
    lines += [""] * bool(table.worse)
    for model, place in table.worse:
        task = table.tasks[place]
        lines.append(
            f"{table.models[model]} is worse than the base on {task.name}: loss "
            f"{task.results[model].loss.loss:.4f} against {task.base:.4f}"
        )
    for task in table.tasks:
        for index, prompt in enumerate(task.prompts):
            lines += ["", f"{task.name}, sample {index + 1}"]
            lines += quote("prompt", prompt.text)
            lines += quote("data", prompt.expected)
            for result in task.results:
                lines += quote(result.name, result.samples[index])
    return lines


def _loss(result: "ModelResult") -> str:
    return f"{result.loss.loss:.4f}"


def _accuracy(result: "ModelResult") -> str:
    return "" if result.labels is None else f"{result.labels.accuracy:.1%}"


def _grid(
    what: str,
    table: "TaskTable",
    tasks: Sequence["TaskResults"],
    cell: Callable[["ModelResult"], str],
    more: dict[str, list[str]],
) -> list[str]:
    """Format one line per model, with a column for each task."""
    columns = {task.name: [cell(result) for result in task.results] for task in tasks}
    columns |= more
    first = max(len(name) for name in (what, *table.models))
    widths = {name: max(len(name), *map(len, cells)) for name, cells in columns.items()}
    head = "".join(f"  {name:>{width}}" for name, width in widths.items())
    lines = [f"{what:<{first}}{head}"]
    for place, model in enumerate(table.models):
        cells = "".join(
            f"  {columns[name][place]:>{width}}" for name, width in widths.items()
        )
        lines.append(f"{model:<{first}}{cells}")
    return lines
