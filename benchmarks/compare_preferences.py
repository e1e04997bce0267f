"""Does DPO raise the accuracy of preferences on held-out pairs? SmolLM2-135M-Instruct.

    python benchmarks/compare_preferences.py --work FOLDER --output runs.jsonl --seed 1
    python benchmarks/compare_preferences.py --output runs.jsonl --summary

The pairs are those of examples/make_preferences.py: the right docstring of a member of
the standard library, or that of its neighbor; test modules do not occur in training.
The script trains once, with validations, and measures the test pairs under the base and
under the adapter: the share of pairs whose chosen answer has the higher log-probability
(summed, and per token), and the share with the higher reward. Intervals are 95 %:
Wilson's for a share, the normal approximation of paired differences for the gain.

Whatever is done already in FOLDER is kept: call the script again after a kill, and it
goes on from the last checkpoint. Each run adds a JSON line to the output. ``--summary``
prints its table: for several seeds, a pair's change is its mean over the seeds, and the
interval is that of the mean over the pairs.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from _machine import describe_machine

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import disabled
from mlx_dora.data.batches import pad_batch
from mlx_dora.data.config import DataConfig
from mlx_dora.data.loading import load_datasets
from mlx_dora.data.preferences import PairDataset
from mlx_dora.demo.model import demo_model
from mlx_dora.evaluate.log_probabilities import row_log_probs
from mlx_dora.evaluate.loss import eval_mode
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.run.finetune import finetune

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from make_preferences import (  # pyright: ignore[reportMissingImports]
    write_preferences,
)

ROWS = 16  # of a measured batch
Z = 1.96
KINDS = ("summed", "per_token")
SMOKE = {"iters": 1, "pairs": 4, "layers": 1}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides the outcome of a run, except the machine."""

    objective: str
    iters: int
    pairs: int
    layers: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.objective}-{self.iters}-{self.pairs}-{self.layers}-" \
               f"{self.rate:g}-{self.seed}"  # fmt: skip


def log_probs(model: nn.Module, data: PairDataset, path: Path) -> np.ndarray:
    """Log-probabilities ``(pairs, chosen or rejected, sum or mean)``, as kept."""
    if path.exists():
        return np.load(path)
    found = np.zeros((len(data), 2))
    order = sorted(range(len(data)), key=lambda index: len(data[index][0]))
    with eval_mode(model):
        for at in range(0, len(order), ROWS):
            places = order[at : at + ROWS]
            batch = pad_batch([data[place] for place in places], 512)
            rows = row_log_probs(model, *batch, gradient=False)
            found[places] = np.stack([np.array(rows.total), np.array(rows.mean)], 1)
    found = found.reshape(-1, 2, 2)
    np.save(path, found)
    return found


def share(right: np.ndarray) -> dict[str, float]:
    """A share with Wilson's interval."""
    n, p = len(right), right.mean()
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return {"share": p, "low": middle - half, "high": middle + half}


def gain(change: np.ndarray) -> dict[str, float]:
    """The mean change of a share over pairs, with its interval."""
    half = Z * change.std(ddof=1) / np.sqrt(len(change))
    return {"gain": change.mean(), "low": change.mean() - half,
            "high": change.mean() + half}  # fmt: skip


def right(logps: np.ndarray) -> dict[str, np.ndarray]:
    """Which pairs' chosen answers are likelier: by either measure, ``(pairs,)``."""
    return {name: (logps[:, 0, place] > logps[:, 1, place]).astype(float)
            for place, name in enumerate(KINDS)}  # fmt: skip


def compare(base: np.ndarray, tuned: np.ndarray) -> dict[str, Any]:
    """The accuracies of two models on the same pairs, and which pairs were right."""
    before, after = right(base), right(tuned)
    rewards = tuned[:, :, 0] - base[:, :, 0]
    higher = (rewards[:, 0] > rewards[:, 1]).astype(float)
    found: dict[str, Any] = {"held_out": len(base), "reward": share(higher)}
    for name in KINDS:
        found[name] = {"base": share(before[name]), "tuned": share(after[name]),
                       "gain": gain(after[name] - before[name])}  # fmt: skip
    pairs = {"reward": higher, **{f"{n} base": v for n, v in before.items()}, **after}
    found["right"] = {n: "".join(str(int(one)) for one in v) for n, v in pairs.items()}
    return found


def summarize(lines: list[dict[str, Any]]) -> None:
    """Print the gains of each objective over its seeds."""
    click.echo("| objective | seeds | higher reward | per token | in sum |")
    click.echo("| --- | --- | --- | --- | --- |")
    for name in dict.fromkeys(line["objective"] for line in lines):
        own = [line["right"] for line in lines if line["objective"] == name]
        marks = {kind: np.array([[int(c) for c in one[kind]] for one in own])
                 for kind in own[0]}  # fmt: skip
        cells = [name, str(len(own))]
        for kind, base in (("reward", None), *((k, f"{k} base") for k in KINDS[::-1])):
            before = 0.5 if base is None else marks[base].mean(0)
            of = gain(marks[kind].mean(0) - before)
            start = 0.5 if base is None else marks[base].mean()
            cells.append(f"{start:.3f} to {marks[kind].mean():.3f}: {of['gain']:+.3f} "
                         f"({of['low']:+.3f} to {of['high']:+.3f})")  # fmt: skip
        click.echo(f"| {' | '.join(cells)} |")


def run(job: Job, work: Path, stop: int | None, *, is_short: bool) -> dict[str, Any]:
    """Train, or resume a training, and measure the held-out pairs."""
    write_preferences(work / "data")
    if is_short:
        for file in (work / "data").iterdir():
            count = 4 if file.stem == "train" else 2
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:count]))
    model, tokenizer = load(str(demo_model()))
    sets = load_datasets(DataConfig(data=str(work / "data")), tokenizer,
                         make=PairDataset)  # fmt: skip
    base = log_probs(model, sets["test"], work / "base.npy")
    rows = sets["train"].rows.values
    train_rows = [rows[i * len(rows) // job.pairs] for i in range(job.pairs)]
    report = finetune(
        model,
        tokenizer,
        train_rows,
        None if is_short or job.objective == "kto" else sets["valid"].rows.values,
        train=TrainConfig(
            objective=job.objective,  # pyright: ignore[reportArgumentType]
            iters=stop or job.iters,
            batch_size=1 if is_short else 4,
            val_batches=15,
            steps_per_eval=20,
            steps_per_report=4,
            save_every=5,
            learning_rate=job.rate,
            seed=job.seed,
            resume=(work / job.name / "checkpoints").exists(),
            lr_schedule={"name": "cosine_decay", "arguments": [job.rate, job.iters],
                         "warmup": 8},
        ),
        dora=DoRAConfig(rank=8, scale=10.0, num_layers=job.layers),
        preference=PreferenceConfig(),
        adapter_path=work / job.name,
    )  # fmt: skip
    tuned = log_probs(model, sets["test"], work / f"{job.name}-{report.steps}.npy")
    with disabled(model):  # the base is untouched
        check = row_log_probs(model, *pad_batch([sets["test"][0]], 512), gradient=False)
    assert abs(float(check.total[0]) - base[0, 0, 0]) < 1e-2
    return {
        "steps": report.steps,
        **compare(base, tuned),
        "curve": [{"step": r.step, "train_loss": r.train_loss, "val_loss": r.val_loss,
                   "metrics": r.metrics} for r in report.history],
        "seconds": report.seconds, "peak_bytes": mx.get_peak_memory(),
    }  # fmt: skip


@click.command()
@click.option("--work", type=Path, default=Path("preferences_work"))
@click.option("--output", type=Path, default=None, help="File of lines to add to.")
@click.option("--objective", default="dpo")
@click.option("--iters", default=80, help="Steps of the learning rate's schedule.")
@click.option("--stop", type=int, default=None, help="Step to stop at, if earlier.")
@click.option("--pairs", default=320, help="Pairs to train on.")
@click.option("--layers", default=8)
@click.option("--rate", default=2e-4)
@click.option("--seed", default=0)
@click.option("--summary", is_flag=True, help="Print what the output holds.")
@click.option("--smoke", is_flag=True, help="One small step, kept nowhere.")
def main(work: Path, output: Path | None, stop: int | None, summary: bool, smoke: bool,
         **settings: Any) -> None:  # fmt: skip
    """Train, measure, print."""
    if summary:
        if output is None:
            raise click.UsageError("--summary needs --output.")
        return summarize([json.loads(text) for text in output.open()])
    job = Job(**{**settings, **(SMOKE if smoke else {})})
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) if smoke else work
        found = run(job, place, stop, is_short=smoke)
    line = json.dumps(
        {"bench": "preference", **describe_machine(), **asdict(job), **found}
    )
    click.echo(line)
    if output is not None:
        with output.open("a") as file:
            file.write(line + "\n")
    return None


if __name__ == "__main__":
    bench  # noqa: B018 - imported for OpenBLAS
    main()
