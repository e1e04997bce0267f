"""Every way of training an adapter at equal trainable parameters, on several tasks.

    python benchmarks/compare_variants.py --output runs.jsonl \
        --task spam data/spam --task dialogue data/chitchat

Each task is a name and a folder with train, valid and test.jsonl. A method's learning
rate is the one of its three with the least validation loss, found with a seed of its
own; then it is trained with every ``--seed``. Ranks are raised module by module until
the trainable parameters are those of DoRA at ``--rank``, as near as whole ranks allow;
the magnitudes alone and full fine-tuning have as many as they have. The measure is the
share of right labels on the test set, where the answers are labels, else that of
answer tokens that the model finds likeliest. A run is one JSON line of the output;
those that stand there are not repeated, so a broken-off comparison goes on.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from _machine import describe_machine

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import adaptable_paths
from mlx_dora.demo.model import demo_model
from mlx_dora.evaluate.batches import batches_once
from mlx_dora.evaluate.data import Dataset, load_datasets
from mlx_dora.evaluate.labels import find_labels, label_accuracy
from mlx_dora.evaluate.loss import eval_mode, evaluate_loss, target_mask
from mlx_dora.layers import weight_of
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.loop import finetune

TUNING_SEED = 1000
ADAPTER_RATES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of training.

    Attributes:
        kind: ``fine_tune_type``.
        settings: Of `DoRAConfig`.
        per_row: Trained numbers a row besides the factors.
        per_matrix: The same a matrix.
        has_rank: Whether it has a low-rank part, whose rank can be chosen.
        rates: Learning rates to choose from, as many for each.
    """

    kind: str = "dora"
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_row: int = 1
    per_matrix: int = 0
    has_rank: bool = True
    rates: tuple[float, ...] = ADAPTER_RATES


METHODS = {
    "lora": Method(kind="lora", per_row=0),
    "dora": Method(),
    "pissa": Method(settings={"init": "pissa"}),
    "doran": Method(settings={"variant": "doran"}, per_matrix=1),
    "map": Method(
        settings={"variant": "map"}, per_row=0, per_matrix=2, rates=(3e-3, 1e-2, 3e-2)
    ),
    "prediag": Method(settings={"variant": "prediag"}),
    "adaptive": Method(settings={"variant": "adaptive"}),  # by its active ranks
    "magnitude": Method(
        settings={"variant": "magnitude"}, has_rank=False, rates=(1e-3, 3e-3, 1e-2)
    ),
    "full": Method(kind="full", has_rank=False, rates=(1e-5, 3e-5, 1e-4)),
}


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
    rows: int


def ranks_for(model: nn.Module, method: Method, job: Job) -> DoRAConfig:
    """A config whose trainable parameters are DoRA's at `job.rank`, or just fewer."""
    config = DoRAConfig(
        rank=job.rank, scale=job.scale, num_layers=job.num_layers, **method.settings
    )
    if not method.has_rank:
        return config
    modules = dict(model.named_modules())
    paths = adaptable_paths(model, config)
    shapes = {path: weight_of(modules[path]).shape for path in paths}
    budget = sum(job.rank * (o + i) + o for o, i in shapes.values())
    budget -= sum(method.per_row * o + method.per_matrix for o, _ in shapes.values())
    one_rank = sum(o + i for o, i in shapes.values())
    rank = max(1, budget // one_rank)
    left, pattern = budget - rank * one_rank, dict.fromkeys(paths, rank)
    for path in paths:
        if sum(shapes[path]) <= left:
            pattern[path], left = rank + 1, left - sum(shapes[path])
    return replace(config, rank=max(pattern.values()), rank_pattern=pattern)


def run(task: str, name: str, rate: float, seed: int, job: Job, *, tunes: bool) -> dict:
    """Train one model; the test set is looked at only when nothing is being tuned."""
    method = METHODS[name]
    model, tokenizer = load(job.model)
    config = TrainConfig(
        data=task,
        fine_tune_type=method.kind,  # pyright: ignore[reportArgumentType] - of the table
        seed=seed,
        batch_size=job.batch_size,
        iters=job.iters,
        learning_rate=rate,
        lr_schedule={"name": "linear_schedule", "arguments": [rate, 0.0, job.iters]},
        optimizer_config={"adam": {"bias_correction": True}},
        steps_per_report=max(1, job.iters // 6),
        save_every=job.iters,
        mask_prompt=True,
        max_seq_length=job.max_seq_length,
        val_batches=0,
        rank_every=max(1, job.iters // 10),
    )
    data = load_datasets(config, tokenizer, ("train", "valid", "test"))
    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        report = finetune(
            model,
            tokenizer,
            data["train"],
            None,
            train=config,
            dora=ranks_for(model, method, job),
            adapter_path=Path(folder) / "adapter",
        )
    found: dict[str, Any] = {
        "trainable": report.trainable_parameters,
        "train_loss": report.train_loss,
        "step_ms": round(1e3 * report.seconds / report.steps, 1),
        "peak_mb": round(report.peak_memory_bytes / 1e6),
        "valid_loss": measure_loss(model, data["valid"], job),
    }
    if not tunes:
        found |= measure_test(model, data["test"], job)
    return found


def measure_loss(model: nn.Module, data: Any, job: Job) -> float:
    return evaluate_loss(
        model,
        data,
        batch_size=4,
        max_seq_length=job.max_seq_length,
        num_batches=-(-job.rows // 4),
    ).loss


def measure_test(model: nn.Module, data: Any, job: Job) -> dict[str, Any]:
    found = {"test_loss": measure_loss(model, data, job)}
    if find_labels(data) is not None:
        labels = label_accuracy(
            model, data, max_seq_length=job.max_seq_length, num_rows=job.rows
        )
        return found | {"accuracy": labels.accuracy, "of": "labels"}
    return found | {"accuracy": token_accuracy(model, data, job), "of": "tokens"}


def token_accuracy(model: Any, data: Dataset, job: Job) -> float:
    """Share of target tokens that the model finds likeliest."""
    right = total = 0
    with eval_mode(model):
        for tokens, lengths in batches_once(
            data, 4, job.max_seq_length, num_batches=-(-job.rows // 4)
        ):
            best = mx.argmax(model(tokens[:, :-1]), axis=-1)
            mask = target_mask(lengths, best.shape[1])
            right += int((mask & (best == tokens[:, 1:])).sum())
            total += int(mask.sum())
    return right / max(total, 1)


def summary(task: str, lines: list[dict[str, Any]], methods: tuple[str, ...]) -> str:
    """A Markdown table: means, and standard deviations over the seeds."""
    rows = [
        f"| {task} | trained | rate | valid loss | test loss | accuracy | ms a step "
        "| peak MB |",
        "| --- " * 8 + "|",
    ]
    for name in methods:
        found = [line for line in lines if line["method"] == name]
        if not found:
            continue

        def told(key: str, digits: int, found: Any = found) -> str:
            values = [line[key] for line in found]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            return f"{np.mean(values):.{digits}f} ± {spread:.{digits}f}"

        first = found[0]
        rows.append(
            f"| {name} (n = {len(found)}) | {first['trainable']:,} | {first['rate']:g} "
            f"| {told('valid_loss', 3)} | {told('test_loss', 3)} "
            f"| {told('accuracy', 3)} | {told('step_ms', 0)} | {told('peak_mb', 0)} |"
        )
    return "\n".join(rows)


@click.command(help=__doc__)
@click.option("--task", "tasks", nargs=2, multiple=True, required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--model", help="The demo's if not given.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(list(METHODS)),
    default=tuple(METHODS),
)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2))
@click.option("--iters", default=120, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--num-layers", default=8, show_default=True)
@click.option("--rank", default=8, show_default=True, help="Of DoRA.")
@click.option("--scale", default=2.0, show_default=True)
@click.option("--max-seq-length", default=256, show_default=True)
@click.option("--rows", default=200, show_default=True, help="Of valid and test.")
@click.option("--smoke", is_flag=True, help="Two steps and one seed of everything.")
def main(
    tasks: tuple[tuple[str, str], ...],
    output: Path,
    model: str | None,
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    smoke: bool,
    **settings: Any,
) -> None:
    job = Job(model=model or str(demo_model()), **settings)
    if smoke:
        job, seeds = replace(job, iters=2, num_layers=1, rows=8), (0,)
    lines = []
    if output.exists():
        lines = [json.loads(line) for line in output.read_text().splitlines()]

    def result(task: str, folder: str, method: str, rate: float, seed: int) -> dict:
        asked = {"task": task, "data": folder, "method": method, "rate": rate}
        asked |= {"seed": seed} | asdict(job)
        for line in lines:
            if asked.items() <= line.items():
                return line
        found = run(folder, method, rate, seed, job, tunes=seed == TUNING_SEED)
        line = asked | found | {"blas": bench.BLAS.state} | describe_machine()
        lines.append(line)
        with output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        click.echo(f"{task} {method} {rate:g} seed {seed}: {found}", err=True)
        return line

    for task, folder in tasks:
        chosen = []
        for method in methods:
            tuned = [
                result(task, folder, method, rate, TUNING_SEED)
                for rate in METHODS[method].rates
            ]
            best = min(tuned, key=lambda line: line["valid_loss"])
            chosen += [
                result(task, folder, method, best["rate"], seed) for seed in seeds
            ]
        click.echo(summary(task, chosen, methods))


if __name__ == "__main__":
    main()
