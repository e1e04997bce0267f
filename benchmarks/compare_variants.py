"""Every way of training an adapter at equal trainable parameters, on several tasks.

    python benchmarks/compare_variants.py --output runs.jsonl \
        --task spam data/spam --task dialogue data/chitchat
    python benchmarks/compare_variants.py --output pace.jsonl --pace \
        --task spam data/spam

Each task is a name and a folder with train, valid and test.jsonl; the last answer of a
row is learnt. A method's learning rate is the one of its three with the least
validation loss, found with a seed of its own; then it is trained with every ``--seed``.
Ranks are raised module by module until the trainable parameters are those of DoRA at
``--rank``, as near as whole ranks allow; the magnitudes alone and full fine-tuning have
as many as they have. The measure is the share of right labels on the test set, where
the answers are labels, else that of answer tokens that the model finds likeliest. The
blocks that nobody trains are computed once a row and task. A run is one JSON line of
the output; those that stand there are not repeated, so a broken-off comparison goes on.

``--pace`` measures instead what a step of each method costs in time and memory, on the
whole model, in turns.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from _machine import describe_machine
from _methods import METHODS, equal_ranks
from _trunk import Row, Trunk, measure, target_loss

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import load
from mlx_dora.data.loading import load_datasets
from mlx_dora.demo.model import demo_model
from mlx_dora.evaluate.labels import find_labels
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.run.finetune import finetune
from mlx_dora.train.run.journal import StepReport, TrainReport

TUNING_SEED = 1000
BASE = "base"  # measured as it is


@dataclass(frozen=True, kw_only=True)
class Job:
    """What decides the outcome of a run, machine apart."""

    model: str
    iters: int
    batch_size: int
    num_layers: int
    rank: int
    scale: float
    max_seq_length: int
    train_rows: int
    rows: int


class Task:
    """The rows of a task that are short enough, and the frozen blocks' view of them."""

    def __init__(self, folder: str, job: Job) -> None:
        model: Any
        model, tokenizer = load(job.model)
        config = TrainConfig(data=folder, mask_prompt=True)
        loaded = load_datasets(config, tokenizer, ("train", "valid", "test"))
        self.rows: dict[str, list[Row]] = {}
        for name, data in loaded.items():
            if data is None:
                raise click.ClickException(f"{folder} has no {name}.jsonl.")
            every = [data[i] for i in range(len(data))]
            short = [
                (tokens, first)
                for tokens, first in every
                if isinstance(first, int) and len(tokens) <= job.max_seq_length
            ]
            self.rows[name] = short[: job.train_rows if name == "train" else job.rows]
        test = loaded["test"]
        assert test is not None
        labels = find_labels(test)
        self.labels = None
        if labels is not None:
            self.labels = [test.parts(0, label).answer[0] for label in labels]
            assert len({*self.labels}) == len(labels)
        frozen = len(model.layers) - job.num_layers
        self.trunk = Trunk(model, frozen)


def train(
    name: str, rate: float, seed: int, job: Job, rows: Sequence[Row], **how: Any
) -> tuple[Any, TrainReport]:
    """Train one model by one method; also what the training told."""
    method = METHODS[name]
    model, tokenizer = load(job.model)
    config = TrainConfig(
        fine_tune_type=method.kind,  # pyright: ignore[reportArgumentType] - of the table
        seed=seed,
        batch_size=job.batch_size,
        iters=job.iters,
        learning_rate=rate,
        lr_schedule={"name": "linear_schedule", "arguments": [rate, 0.0, job.iters]},
        optimizer_config={"adam": {"bias_correction": True}},
        steps_per_report=how.pop("steps_per_report", max(1, job.iters // 6)),
        save_every=job.iters,
        mask_prompt=True,
        max_seq_length=job.max_seq_length,
        val_batches=0,
        rank_every=max(1, job.iters // 10),
    )
    dora = DoRAConfig(rank=job.rank, scale=job.scale, num_layers=job.num_layers)
    with tempfile.TemporaryDirectory() as folder:
        report = finetune(
            model,
            tokenizer,
            rows,
            None,
            train=config,
            dora=equal_ranks(model, method, dora),
            adapter_path=Path(folder) / "adapter",
            **how,
        )
    return model, report


def run(task: Task, name: str, rate: float, seed: int, job: Job) -> dict[str, Any]:
    """Train and measure; the test set is looked at only when nothing is being tuned."""
    found: dict[str, Any] = {"trainable": 0}
    if name == BASE:
        model, _ = load(job.model)
    else:
        model, report = train(
            name,
            rate,
            seed,
            job,
            task.rows["train"],
            loss=target_loss(task.trunk.frozen),
            batches=task.trunk.batches(),
        )
        found = {
            "trainable": report.trainable_parameters,
            "train_loss": report.train_loss,
        }
    valid = measure(model, task.trunk, task.rows["valid"], task.labels)
    found |= {"valid_loss": valid.loss}
    if seed == TUNING_SEED:
        return found
    test = measure(model, task.trunk, task.rows["test"], task.labels)
    of = "answer tokens" if task.labels is None else "labels"
    return found | {"test_loss": test.loss, "accuracy": test.accuracy, "of": of}


def pace(name: str, job: Job, rows: Sequence[Row]) -> dict[str, Any]:
    """Time of each step but the first two, and peak memory; no trunk is kept."""
    at: list[float] = []

    def note(report: StepReport) -> None:
        at.append(report.seconds)

    mx.clear_cache()
    mx.reset_peak_memory()
    rate = METHODS[name].rates[0]
    _, report = train(name, rate, 0, job, rows, steps_per_report=1, callback=note)
    return {
        "trainable": report.trainable_parameters,
        "step_ms": [round(1e3 * one, 1) for one in np.diff(at)[1:]],
        "peak_mb": round(report.peak_memory_bytes / 1e6),
    }


def told(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ± {spread:.{digits}f}"


def summary(task: str, lines: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: means, and standard deviations over the seeds."""
    rows = [
        f"| {task} | trained | rate | valid loss | test loss | accuracy |",
        "| --- " * 6 + "|",
    ]
    for name in dict.fromkeys(line["method"] for line in lines):
        found = [line for line in lines if line["method"] == name]
        parts = [
            told([line[key] for line in found], 3)
            for key in ("valid_loss", "test_loss", "accuracy")
        ]
        rate, trainable = found[0]["rate"], found[0]["trainable"]
        rows.append(
            f"| {name} (n = {len(found)}) | {trainable:,} | {rate:g} | "
            f"{' | '.join(parts)} |"
        )
    return "\n".join(rows)


def pace_summary(lines: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: medians, and their ratios to LoRA's."""
    median = {
        name: float(
            np.median([s for x in lines if x["method"] == name for s in x["step_ms"]])
        )
        for name in dict.fromkeys(line["method"] for line in lines)
    }
    peak = {line["method"]: line["peak_mb"] for line in lines}
    first = next(iter(median))
    rows = [f"| method | ms a step | ÷ {first} | peak MB |", "| --- " * 4 + "|"]
    rows += [
        f"| {name} | {ms:.0f} | {ms / median[first]:.2f} | {peak[name]} |"
        for name, ms in median.items()
    ]
    return "\n".join(rows)


class Output:
    """The lines of earlier runs, and those that come."""

    def __init__(self, path: Path, job: Job) -> None:
        self._path, self.job = path, job
        self._lines: list[dict[str, Any]] = []
        if path.exists():
            self._lines = [json.loads(line) for line in path.read_text().splitlines()]

    def find(self, **asked: Any) -> dict[str, Any] | None:
        """The line of a run that was made before."""
        wanted = (asked | asdict(self.job)).items()
        return next((line for line in self._lines if wanted <= line.items()), None)

    def add(self, asked: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Keep what a run found, also if the next one is broken off."""
        line = asked | asdict(self.job) | found
        line |= {"blas": bench.BLAS.state} | describe_machine()
        self._lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        click.echo(" ".join(f"{k} {v}" for k, v in (asked | found).items()), err=True)
        return line


def compare(
    name: str, folder: str, methods: Sequence[str], seeds: Sequence[int], output: Output
) -> list[dict[str, Any]]:
    """Tune every method on a task, and train it with each seed."""
    opened: list[Task] = []

    def result(method: str, rate: float, seed: int) -> dict[str, Any]:
        asked = {"task": name, "method": method, "rate": rate, "seed": seed}
        if (line := output.find(**asked)) is not None:
            return line
        if not opened:
            opened.append(Task(folder, output.job))
        return output.add(asked, run(opened[0], method, rate, seed, output.job))

    lines = [result(BASE, 0.0, 0)]
    for method in methods:
        rates = METHODS[method].rates
        tuned = [result(method, rate, TUNING_SEED) for rate in rates]
        rate = min(tuned, key=lambda line: line["valid_loss"])["rate"]
        lines += [result(method, rate, seed) for seed in seeds]
    return lines


@click.command(help=__doc__)
@click.option("--task", "tasks", nargs=2, multiple=True, required=True)
@click.option("--output", "path", type=click.Path(path_type=Path), required=True)
@click.option("--model", help="A Llama-like model; the demo's if not given.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(list(METHODS)),
    default=tuple(METHODS),
)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2))
@click.option("--iters", default=80, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--num-layers", default=2, show_default=True)
@click.option("--rank", default=8, show_default=True, help="Of DoRA.")
@click.option("--scale", default=2.0, show_default=True)
@click.option("--max-seq-length", default=256, show_default=True)
@click.option("--train-rows", default=800, show_default=True)
@click.option("--rows", default=200, show_default=True, help="Of valid and test.")
@click.option("--pace", "is_pace", is_flag=True, help="Time and memory of a step.")
@click.option("--smoke", is_flag=True, help="Two steps and one seed of everything.")
def main(
    tasks: tuple[tuple[str, str], ...],
    path: Path,
    model: str | None,
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    is_pace: bool,
    smoke: bool,
    **settings: Any,
) -> None:
    job = Job(model=model or str(demo_model()), **settings)
    if smoke:
        job, seeds = replace(job, iters=2, num_layers=1, rows=8), (0,)
    output = Output(path, job)
    for name, folder in tasks:
        if is_pace:
            rows = Task(folder, job).rows["train"]
            lines = [
                output.add({"task": name, "method": method}, pace(method, job, rows))
                for _ in seeds
                for method in methods
            ]
            click.echo(pace_summary(lines))
        else:
            click.echo(summary(name, compare(name, folder, methods, seeds, output)))


if __name__ == "__main__":
    main()
