"""Adapters of several tasks merged by every method, measured on every task.

    python benchmarks/merge_tasks.py --model M --work FOLDER [--peers PYTHON] \
        --task docs adapters/docs data/docs --task spam adapters/spam data/spam ...

Each ``--task`` is a name, an adapter trained for it, and its data. The loss is that of
the task's test rows, prompts masked (but for a task named by ``--whole``); tasks whose
answers are labels get an accuracy too. Slerp takes the adapters in turn, the k-th with
weight 1/k; Fisher information is estimated on the task's training rows. With
``--peers`` PEFT merges the same adapters, and mergekit the same weights, fused. One
JSON line each goes to ``FOLDER/results.jsonl``; a contender that is there is not
measured again.

The blocks before the first adapted one give the same for every contender, and are run
once a batch.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from _peer_merges import by_mergekit, by_peft, in_turn

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.files import load_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import remove_dora
from mlx_dora.data.config import DataConfig
from mlx_dora.data.dataset import Dataset
from mlx_dora.data.loading import make_datasets
from mlx_dora.data.splits import read_splits
from mlx_dora.evaluate.labels import find_labels, label_accuracy
from mlx_dora.evaluate.loss import evaluate_loss
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.merge.adapters.dense import Options
from mlx_dora.merge.adapters.merge import merge_adapters_report
from mlx_dora.merge.fisher.config import FisherConfig
from mlx_dora.merge.fisher.estimate import estimate_fisher, read_targets
from mlx_dora.merge.fisher.information import Fisher
from mlx_dora.merge.methods import METHODS

GRANULARITIES = ("row", "element")


class Remembered(nn.Module):
    """The first blocks as one, whose output is kept by its input."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = blocks
        self.use_sliding = False
        self._known: dict[bytes, np.ndarray] = {}

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """What the blocks make of `x`."""
        key = hashlib.sha1(np.array(x).tobytes()).digest()
        if key not in self._known:
            for block in self.blocks:
                x = block(x, mask, cache=cache)
            self._known[key] = np.array(x)
        return mx.array(self._known[key])


class Nothing(nn.Module):
    """Stands where a remembered block was."""

    def __init__(self) -> None:
        super().__init__()
        self.use_sliding = False

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """`x`."""
        return x


def remember_blocks(model: Any, count: int) -> None:
    blocks = model.model.layers
    rest = [Nothing() for _ in range(count - 1)]
    model.model.layers = [Remembered(blocks[:count]), *rest, *blocks[count:]]


@dataclass
class Study:
    """The base, the tasks' data, and where the results go."""

    model: nn.Module
    sets: dict[str, Dataset]
    batches: int
    length: int
    results: Path
    first: int
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.results.exists():
            lines = self.results.read_text().splitlines()
            self.done = {json.loads(line)["contender"] for line in lines}

    def adapter(self, name: str, make: Callable[[], Adapter | None]) -> None:
        """Measure an adapter; None is the base."""
        if name in self.done:
            return
        started = time.perf_counter()
        adapter = make()
        seconds = time.perf_counter() - started
        if adapter is not None:
            attach_adapter(self.model, adapter, check_base=False)
        rank = adapter.config.rank if adapter else None
        self._report(name, rank=rank, merge_seconds=round(seconds, 2))
        remove_dora(self.model)

    def dense(self, name: str, folder: Path) -> None:
        """Measure a dense model whose first blocks are the base's."""
        if name in self.done:
            return
        found = Checkpoint(folder)
        parameters = dict(_flat(self.model))
        blocks = [f"model.layers.{i}." for i in range(self.first, 1000)]
        before = {}
        for path in found.names:
            tensor = found.tensor(path)
            if path.startswith(tuple(blocks)):
                before[path] = parameters[path]
                continue
            own = path
            for i in range(self.first):
                own = own.replace(f"model.layers.{i}.", f"model.layers.0.blocks.{i}.")
            # mergekit's karcher of equal matrices is off by up to 1.4e-5.
            if not bench.relative_rms(tensor, parameters[own]) < 1e-4:
                raise click.ClickException(f"{folder}: {path} is not the base's")
        changed = [(path, Checkpoint(folder).tensor(path)) for path in before]
        self.model.load_weights(changed, strict=False)
        self._report(name, rank=None)
        self.model.load_weights(list(before.items()), strict=False)

    def _report(self, name: str, **facts: Any) -> None:
        self.model.eval()
        tasks = {task: self._measure(data) for task, data in self.sets.items()}
        losses = [one["loss"] for one in tasks.values()]
        line = {
            "contender": name,
            **facts,
            "tasks": tasks,
            "mean_loss": round(sum(losses) / len(losses), 4),
            "blas": bench.BLAS.state,
        }
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        click.echo(json.dumps(line))

    def _measure(self, data: Dataset) -> dict[str, float]:
        loss = evaluate_loss(
            self.model,
            data,
            batch_size=4,
            max_seq_length=self.length,
            num_batches=self.batches,
        )
        told = {"loss": round(loss.loss, 4), "rows": loss.rows - loss.rows_skipped}
        if (labels := find_labels(data)) is not None:
            found = label_accuracy(
                self.model,
                data,
                labels,
                max_seq_length=self.length,
                num_rows=16 * self.batches,
            )
            told |= {
                "accuracy": round(found.accuracy, 4),
                "label_rows": found.rows,
            }
        return told


def _flat(model: nn.Module) -> Iterator[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    yield from cast(Any, tree_flatten(model.parameters()))


def read_task(data: str, tokenizer: Any, is_whole: bool) -> Dataset:
    config = DataConfig(data=data, mask_prompt=not is_whole)
    found = make_datasets(read_splits(config, ["test"]), tokenizer)["test"]
    assert found is not None
    return found


def fishers(
    model: nn.Module,
    tokenizer: Any,
    tasks: tuple[tuple[str, str, str], ...],
    whole: tuple[str, ...],
    length: int,
    granularity: str,
) -> list[Fisher]:
    found = []
    adapters = [load_adapter(adapter) for _, adapter, _ in tasks]
    paths = sorted({path for one in adapters for path in one.paths})
    for (name, _, data), adapter in zip(tasks, adapters, strict=True):
        config = FisherConfig(
            data=data,
            whole=name in whole,
            max_seq_length=length,
            granularity=cast(Any, granularity),
        )
        attach_adapter(model, adapter, check_base=False)
        rows = read_targets(config, tokenizer)
        found.append(estimate_fisher(model, rows, paths=paths, config=config))
        remove_dora(model)
    return found


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--task", "tasks", nargs=3, multiple=True, required=True)
@click.option("--also", nargs=2, multiple=True, help="A name, and another adapter.")
@click.option("--whole", multiple=True, help="A task in which every token counts.")
@click.option("--method", "methods", multiple=True, help="All if not given.")
@click.option("--batches", default=12, show_default=True, help="Of 4 rows, a task.")
@click.option("--max-seq-length", default=128, show_default=True)
@click.option("--rank", type=int, help="Cut every merged adapter to this rank.")
@click.option("--peers", help="An interpreter with peft and mergekit.")
def main(
    model: str,
    work: Path,
    tasks: tuple[tuple[str, str, str], ...],
    also: tuple[tuple[str, str], ...],
    whole: tuple[str, ...],
    methods: tuple[str, ...],
    batches: int,
    max_seq_length: int,
    rank: int | None,
    peers: str | None,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load(model)
    paths = [adapter for _, adapter, _ in tasks]
    adapters = [load_adapter(one) for one in paths]
    adapted = {path for one in adapters for path in one.paths}
    first = min(int(path.split(".")[2]) for path in adapted)
    remember_blocks(base, first)
    study = Study(
        model=base,
        sets={name: read_task(data, tokenizer, name in whole)
              for name, _, data in tasks},
        batches=batches,
        length=max_seq_length,
        results=work / "results.jsonl",
        first=first,
    )  # fmt: skip

    def merged(method: str, of: list[Adapter], **kw: Any) -> Adapter:
        return merge_adapters_report(
            of,
            model=base,
            method=method,
            rank=rank,
            check_base=False,
            options=Options(),
            **kw,
        ).adapter

    def slerp() -> Adapter:
        def both(one: Adapter, other: Adapter, count: int) -> Adapter:
            return merged("slerp", [one, other], weights=[1 - 1 / count, 1 / count])

        return in_turn(adapters[0], adapters[1:], both)

    def informed(granularity: str) -> Adapter:
        known = fishers(base, tokenizer, tasks, whole, max_seq_length, granularity)
        return merged("fisher", adapters, fisher=known)

    study.adapter("base", lambda: None)
    for (name, _, _), adapter in zip(tasks, adapters, strict=True):
        study.adapter(f"adapter {name}", lambda adapter=adapter: adapter)
    for method in methods or METHODS:
        if METHODS[method].needs_fisher:
            for one in GRANULARITIES:
                study.adapter(f"fisher by {one}", lambda one=one: informed(one))
        elif method == "slerp":
            study.adapter("slerp, in turn", slerp)
        else:
            study.adapter(method, lambda method=method: merged(method, adapters))
    for name, path in also:
        study.adapter(name, lambda path=path: load_adapter(path))
    if peers:
        for name, folder in by_peft(peers, model, paths, work):
            study.adapter(name, lambda folder=folder: load_adapter(folder))
        for name, folder in by_mergekit(peers, model, paths, work):
            study.dense(name, folder)


if __name__ == "__main__":
    main()
