"""GRPO on a task that a 135M model can learn: DoRA, and LoRA at equal parameters.

    python benchmarks/compare_grpo.py --output grpo.jsonl

The task: of two numbers between 10 and 99, reply with the larger and nothing else,
within 6 tokens. The reward is the mean of two shipped rewards: ``regex_match`` (two
digits, perhaps with a period, and no more) and ``number_match`` (the last number is the
larger). Both methods see the same prompts; each trains with every ``--seed``, after
which the mean reward on the same held-out prompts is compared with that of the base.

Each run is a JSON line of the output with its curve. Runs already in the output are not
repeated, and one that was interrupted resumes from its checkpoint.
``--summary`` reads the output and prints the table and the curves that the docs quote.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import math
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from _machine import describe_machine
from _methods import METHODS, equal_ranks

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import load
from mlx_dora.demo.model import demo_model
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.run.finetune import finetune

REWARD = RewardConfig(
    reward_funcs=("regex_match", "number_match"),
    reward_weights=(0.5, 0.5),
    reward_arguments={"regex_match": {"pattern": "[0-9][0-9][.]?"}},
    num_generations=8,
    num_generations_eval=4,
    max_completion_length=6,
    stop_words=("\n",),
)


SMOKE = {
    "methods": ("dora",),
    "seeds": (0,),
    "iters": 1,
    "batch_size": 1,
    "num_layers": 1,
    "held_out": 1,
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides the outcome of a run, except the machine."""

    model: str
    method: str
    seed: int
    iters: int
    batch_size: int
    num_layers: int
    rank: int
    scale: float
    learning_rate: float
    held_out: int


def rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Prompts of the task with their answers."""
    chance, made = random.Random(seed), []
    for _ in range(count):
        first, second = chance.sample(range(10, 100), 2)
        prompt = f"Question: which is larger, {first} or {second}?\nAnswer:"
        made.append({"prompt": prompt, "answer": max(first, second)})
    return made


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Train, or resume a training, and return its curve and held-out rewards."""
    model, tokenizer = load(job.model)
    method = METHODS[job.method]
    dora = DoRAConfig(rank=job.rank, scale=job.scale, num_layers=job.num_layers)
    report = finetune(
        model,
        tokenizer,
        rows(1, 400),
        rows(2, job.held_out),
        train=TrainConfig(
            objective="grpo",
            fine_tune_type=method.kind,  # pyright: ignore[reportArgumentType] - of the table
            seed=job.seed,
            iters=job.iters,
            batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            max_grad_norm=1.0,
            max_seq_length=32,
            steps_per_report=1,
            steps_per_eval=job.iters,
            val_batches=-1,
            save_every=4,
            resume=True,
        ),
        dora=equal_ranks(model, method, dora),
        adapter_path=folder,
        reward=REWARD,
    )
    of = [(r.step, r.metrics or {}) for r in report.history if r.train_loss is not None]
    valid = [r.metrics or {} for r in report.history if r.val_loss is not None]
    return {
        "trainable": report.trainable_parameters,
        "curve": [round(metrics["reward"], 4) for _, metrics in of],
        "before": valid[0],
        "after": valid[-1],
        "seconds": report.seconds,
    }


def interval(values: list[float]) -> str:
    """Mean and half the 95 % interval of Student's t for 2 or 3 values."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    factor = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    return f"{mean:.3f} ± {factor * deviation / math.sqrt(len(values)):.3f}"


def summarize(lines: list[dict[str, Any]]) -> None:
    """Print a table of the methods, and the curves of the runs in steps of four."""
    click.echo("| method | trainable | before | after | gain | alone | larger |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- |")
    for name in dict.fromkeys(line["job"]["method"] for line in lines):
        own = [line for line in lines if line["job"]["method"] == name]
        before, after = ([line[when] for line in own] for when in ("before", "after"))
        pairs = zip(before, after, strict=True)
        cells = [
            f"{name}, {len(own)} seeds",
            f"{own[0]['trainable']:,}",
            interval([metrics["reward"] for metrics in before]),
            interval([metrics["reward"] for metrics in after]),
            interval([last["reward"] - first["reward"] for first, last in pairs]),
            interval([metrics["rewards/regex_match"] for metrics in after]),
            interval([metrics["rewards/number_match"] for metrics in after]),
        ]
        click.echo(f"| {' | '.join(cells)} |")
    steps = range(0, min(len(line["curve"]) for line in lines) - 3, 4)
    click.echo(f"\n| run | {' | '.join(f'{at + 1}–{at + 4}' for at in steps)} |")
    click.echo(f"| --- |{' --- |' * len(steps)}")
    for line in sorted(lines, key=lambda line: line["job"]["method"]):
        means = [f"{sum(line['curve'][at : at + 4]) / 4:.2f}" for at in steps]
        name = f"{line['job']['method']}, seed {line['job']['seed']}"
        click.echo(f"| {name} | {' | '.join(means)} |")


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("grpo.jsonl"))
@click.option("--work", type=click.Path(path_type=Path), default=Path("grpo_work"))
@click.option("--model", default="demo", help="A folder; the demo's model by default.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2))
@click.option("--iters", default=32)
@click.option("--batch-size", default=2)
@click.option("--num-layers", default=8)
@click.option("--rank", default=8)
@click.option("--scale", default=10.0)
@click.option("--learning-rate", default=3e-4)
@click.option("--held-out", default=32)
@click.option("--summary", is_flag=True, help="Print what the output holds.")
@click.option("--smoke", is_flag=True, help="One small update, kept nowhere.")
def main(summary: bool, smoke: bool, **settings: Any) -> None:
    """Run what the output lacks."""
    if smoke:
        with tempfile.TemporaryDirectory() as folder:
            place = {"output": Path(folder, "out.jsonl"), "work": Path(folder)}
            compare(**{**settings, **place, **SMOKE})
    else:
        compare(**settings, summary=summary)


def compare(
    *,
    output: Path,
    work: Path,
    model: str,
    seeds: tuple[int, ...],
    methods: tuple[str, ...] = ("dora", "lora"),
    summary: bool = False,
    **settings: Any,
) -> None:
    """Run the jobs that the output lacks, or summarize it."""
    lines = []
    if output.exists():
        lines = [json.loads(line) for line in output.read_text().splitlines()]
    if summary:
        return summarize(lines)
    done = [line["job"] for line in lines]
    model = str(demo_model()) if model == "demo" else model
    for seed in seeds:
        for method in methods:
            job = Job(model=Path(model).name, method=method, seed=seed, **settings)
            if asdict(job) in done:
                continue
            result = run(
                Job(**{**asdict(job), "model": model}), work / f"{method}-{seed}"
            )
            machine = {**describe_machine(), "blas": str(bench.BLAS)}
            line = {"job": asdict(job), **result, "machine": machine}
            with output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            after = result["after"]["reward"]
            click.echo(
                f"{method} seed {seed}: {result['before']['reward']:.3f} -> {after:.3f}"
            )
    return None


if __name__ == "__main__":
    main()
