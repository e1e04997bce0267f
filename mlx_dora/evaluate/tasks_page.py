"""The page of an evaluation: one self-contained HTML file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_dora.evaluate.tasks import TaskResults, TaskTable
from mlx_dora.page import provenance, render_page

_SCRIPT = Path(__file__).with_name("tasks.js")


def render_tasks(table: TaskTable, command: Sequence[str] = ()) -> str:
    """Return the losses, accuracies and continuations of a table as HTML.

    Models and data sets have their short names; the command shows only the last name
    of local paths.

    Args:
        table: The results.
        command: The words of the command that makes the page, if any.
    """
    page = {
        "models": list(table.models),
        "tasks": [_task(task) for task in table.tasks],
        "provenance": provenance(command),
    }
    return render_page("mlx_dora evaluation", page, _SCRIPT)


def _task(task: TaskResults) -> dict[str, Any]:
    first = task.results[0].loss
    return {
        "name": task.name,
        "split": task.split,
        "rows": first.rows,
        "tokens": first.tokens,
        "losses": [
            result.loss.loss if math.isfinite(result.loss.loss) else None
            for result in task.results
        ],
        "accuracies": [
            None if result.labels is None else result.labels.accuracy
            for result in task.results
        ],
        "prompts": [
            {
                "text": prompt.text,
                "expected": prompt.expected,
                "samples": [result.samples[place] for result in task.results],
            }
            for place, prompt in enumerate(task.prompts)
        ],
    }
