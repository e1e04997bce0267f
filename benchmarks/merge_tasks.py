"""Adapters of several tasks merged by every method, measured on every task.

    python benchmarks/merge_tasks.py --model M \
        --task docs adapters/docs data/docs --task spam adapters/spam data/spam ...

Each ``--task`` is a name, an adapter trained for it, and its data. The loss is that of
the task's test rows, prompts masked (but for a task named by ``--whole``); tasks whose
answers are labels get an accuracy too. Other adapters of the same base, merged
elsewhere, are measured beside ours with ``--also NAME ADAPTER``. One JSON line each.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import time
from typing import Any

import click
import mlx.nn as nn

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.files import load_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import remove_dora
from mlx_dora.evaluate.config import DataConfig
from mlx_dora.evaluate.data import Dataset, make_datasets
from mlx_dora.evaluate.labels import find_labels, label_accuracy
from mlx_dora.evaluate.loss import evaluate_loss
from mlx_dora.evaluate.rows import read_splits
from mlx_dora.merge.adapters import merge_adapters_report
from mlx_dora.merge.dense import Options
from mlx_dora.merge.names import ADAPTER_METHODS

# Defaults of the papers where a method has a setting.
OPTIONS = {
    "ties": Options(density=0.2),
    "dare": Options(density=0.5),
    "dare_ties": Options(density=0.5),
}


def read_task(data: str, tokenizer: Any, is_whole: bool) -> Dataset:
    config = DataConfig(data=data, mask_prompt=not is_whole)
    found = make_datasets(read_splits(config, ["test"]), tokenizer)["test"]
    assert found is not None
    return found


def measure(model: nn.Module, data: Dataset, batches: int, length: int) -> dict:
    loss = evaluate_loss(
        model, data, batch_size=4, max_seq_length=length, num_batches=batches
    )
    told: dict[str, float] = {"loss": round(loss.loss, 4)}
    if (labels := find_labels(data)) is not None:
        found = label_accuracy(
            model, data, labels, max_seq_length=length, num_rows=4 * batches
        )
        told["accuracy"] = round(found.accuracy, 4)
    return told


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--task", "tasks", nargs=3, multiple=True, required=True)
@click.option("--also", nargs=2, multiple=True)
@click.option("--whole", multiple=True, help="A task in which every token counts.")
@click.option("--method", "methods", multiple=True, help="All if not given.")
@click.option("--batches", default=8, show_default=True, help="Of 4 rows, a task.")
@click.option("--max-seq-length", default=128, show_default=True)
@click.option("--rank", type=int, help="Cut every merged adapter to this rank.")
def main(
    model: str,
    tasks: tuple[tuple[str, str, str], ...],
    also: tuple[tuple[str, str], ...],
    whole: tuple[str, ...],
    methods: tuple[str, ...],
    batches: int,
    max_seq_length: int,
    rank: int | None,
) -> None:
    base, tokenizer = load(model)
    sets = {name: read_task(data, tokenizer, name in whole) for name, _, data in tasks}
    adapters = [load_adapter(adapter) for _, adapter, _ in tasks]

    def report(name: str, adapter: Adapter | None, seconds: float = 0.0) -> None:
        if adapter is not None:
            attach_adapter(base, adapter, check_base=False)
        base.eval()
        line = {
            "contender": name,
            "rank": adapter.config.rank if adapter else None,
            "merge_seconds": round(seconds, 2),
            "tasks": {
                task: measure(base, data, batches, max_seq_length)
                for task, data in sets.items()
            },
            "blas": bench.BLAS.state,
        }
        losses = [one["loss"] for one in line["tasks"].values()]
        line["mean_loss"] = round(sum(losses) / len(losses), 4)
        click.echo(json.dumps(line))
        remove_dora(base)

    report("base", None)
    for (name, _, _), adapter in zip(tasks, adapters, strict=True):
        report(f"adapter {name}", adapter)
    for method in methods or ADAPTER_METHODS:
        if method == "slerp" and len(adapters) > 2:
            continue
        started = time.perf_counter()
        merged = merge_adapters_report(
            adapters,
            model=base,
            method=method,
            rank=rank,
            options=OPTIONS.get(method, Options()),
        )
        report(method, merged.adapter, time.perf_counter() - started)
    for name, path in also:
        report(name, load_adapter(path))


if __name__ == "__main__":
    main()
