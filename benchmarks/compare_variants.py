"""Compare all ways of training at equal trainable parameters, on several tasks.

    python benchmarks/compare_variants.py --output runs.jsonl \
        --task spam data/spam --task dialogue data/chitchat
    python benchmarks/compare_variants.py --output pace.jsonl --pace \
        --task spam data/spam

Each task is a name and a folder with train, valid and test.jsonl. The training target
is the last answer of a row. For each method, the script tries three learning rates with
a separate seed, chooses the rate with the lowest validation loss, and then trains with
every ``--seed``. Ranks are raised module by module until the trainable parameters equal
those of DoRA at ``--rank``, as nearly as whole ranks allow. Full fine-tuning and the
variant that trains only magnitudes keep the parameters that they have.

If the answers of a task are labels, accuracy is the share of right labels on the test
set. Otherwise it is the share of answer tokens that the model ranks highest. The frozen
blocks are computed once per row and task. Each run is a JSON line of the output. Runs
already in the output are not repeated, so an interrupted comparison continues where it
stopped.

With ``--pace``, the script instead measures the time and memory of a step of each
method, on the whole model, in turns.
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
BASE = "base"  # measured without training


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides the outcome of a run, except the machine."""

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
    """The rows of a task that are short enough, and the trunk of frozen blocks."""

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
    """Train a model by a method, and return it with the training's report."""
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
    """Train and measure; the test set is used only if nothing is being tuned."""
    result: dict[str, Any] = {"trainable": 0}
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
        result = {
            "trainable": report.trainable_parameters,
            "train_loss": report.train_loss,
        }
    valid = measure(model, task.trunk, task.rows["valid"], task.labels)
    result |= {"valid_loss": valid.loss}
    if seed == TUNING_SEED:
        return result
    test = measure(model, task.trunk, task.rows["test"], task.labels)
    of = "answer tokens" if task.labels is None else "labels"
    return result | {"test_loss": test.loss, "accuracy": test.accuracy, "of": of}


def pace(name: str, job: Job, rows: Sequence[Row]) -> dict[str, Any]:
    """Measure peak memory and the time of each step except the first two."""
    at: list[float] = []

    def note(report: StepReport) -> None:
        at.append(report.seconds)

    mx.clear_cache()
    mx.reset_peak_memory()
    rate = METHODS[name].rates[0]
    _, report = train(name, rate, 0, job, rows, steps_per_report=1, callback=note)
    return {
        "trainable": report.trainable_parameters,
        "step_ms": [round(1e3 * seconds, 1) for seconds in np.diff(at)[1:]],
        "peak_mb": round(report.peak_memory_bytes / 1e6),
    }


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Format mean and standard deviation."""
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ± {spread:.{digits}f}"


def summary(task: str, lines: Sequence[dict[str, Any]]) -> str:
    """Format a Markdown table of means and standard deviations over the seeds."""
    rows = [
        f"| {task} | trained | rate | valid loss | test loss | accuracy |",
        "| --- " * 6 + "|",
    ]
    for name in dict.fromkeys(line["method"] for line in lines):
        runs = [line for line in lines if line["method"] == name]
        parts = [
            mean_and_spread([line[key] for line in runs], 3)
            for key in ("valid_loss", "test_loss", "accuracy")
        ]
        rate, trainable = runs[0]["rate"], runs[0]["trainable"]
        rows.append(
            f"| {name} (n = {len(runs)}) | {trainable:,} | {rate:g} | "
            f"{' | '.join(parts)} |"
        )
    return "\n".join(rows)


def pace_summary(lines: Sequence[dict[str, Any]]) -> str:
    """Format a Markdown table of medians and their ratios to the first method's."""
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
    """The lines of earlier runs and of new runs."""

    def __init__(self, path: Path, job: Job) -> None:
        self._path, self.job = path, job
        self._lines: list[dict[str, Any]] = []
        if path.exists():
            self._lines = [json.loads(line) for line in path.read_text().splitlines()]

    def find(self, **asked: Any) -> dict[str, Any] | None:
        """Return the line of an earlier run, or None."""
        wanted = (asked | asdict(self.job)).items()
        return next((line for line in self._lines if wanted <= line.items()), None)

    def add(self, asked: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """Write the result of a run at once, so that an interruption cannot lose it."""
        line = asked | asdict(self.job) | result
        line |= {"blas": bench.BLAS.state} | describe_machine()
        self._lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        click.echo(" ".join(f"{k} {v}" for k, v in (asked | result).items()), err=True)
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
@click.option("--model", help="A Llama-like model (default: the demo's).")
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
@click.option("--rank", default=8, show_default=True, help="Rank of DoRA.")
@click.option("--scale", default=2.0, show_default=True)
@click.option("--max-seq-length", default=256, show_default=True)
@click.option("--train-rows", default=800, show_default=True)
@click.option(
    "--rows", default=200, show_default=True, help="Validation and test rows."
)
@click.option(
    "--pace", "is_pace", is_flag=True, help="Measure time and memory of a step instead."
)
@click.option("--smoke", is_flag=True, help="Train two steps with one seed.")
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
