"""Does DPO raise the accuracy of preferences on held-out pairs? SmolLM2-135M-Instruct.

    python benchmarks/compare_preferences.py --work FOLDER

The pairs are those of examples/make_preferences.py: the right docstring of a member of
the standard library, or that of its neighbor; test modules do not occur in training.
The script trains once, with validations, and measures the test pairs under the base and
under the adapter: the share of pairs whose chosen answer has the higher log-probability
(summed, and per token), and the share with the higher reward. Intervals are 95 %:
Wilson's for a share, the normal approximation of paired differences for the gain.

Whatever is done already in FOLDER is kept: call the script again after a kill, and it
goes on from the last checkpoint. One JSON line.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import sys
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


def gain(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """The mean paired difference of two shares with its interval."""
    change = after.astype(float) - before
    half = Z * change.std(ddof=1) / np.sqrt(len(change))
    return {"gain": change.mean(), "low": change.mean() - half,
            "high": change.mean() + half}  # fmt: skip


def compare(base: np.ndarray, tuned: np.ndarray) -> dict[str, Any]:
    """The accuracies of two models on the same pairs."""
    found: dict[str, Any] = {"pairs": len(base)}
    for place, name in enumerate(("summed", "per_token")):
        right = [logps[:, 0, place] > logps[:, 1, place] for logps in (base, tuned)]
        found[name] = {"base": share(right[0]), "tuned": share(right[1]),
                       "gain": gain(*right)}  # fmt: skip
    reward = tuned[:, :, 0] - base[:, :, 0]
    found["reward"] = share(reward[:, 0] > reward[:, 1])
    return found


@click.command()
@click.option("--work", type=Path, required=True)
@click.option("--objective", default="dpo")
@click.option("--iters", default=80, help="Steps of the learning rate's schedule.")
@click.option("--stop", type=int, default=None, help="Step to stop at, if earlier.")
@click.option("--pairs", default=320, help="Pairs to train on.")
@click.option("--layers", default=8)
@click.option("--rate", default=2e-4)
@click.option("--seed", default=0)
def main(work: Path, objective: str, iters: int, pairs: int, layers: int, rate: float,
         seed: int, stop: int | None) -> None:  # fmt: skip
    """Train, measure, print."""
    write_preferences(work / "data")
    model, tokenizer = load(str(demo_model()))
    config = DataConfig(data=str(work / "data"))
    sets = load_datasets(config, tokenizer, make=PairDataset)
    base = log_probs(model, sets["test"], work / "base.npy")
    train_rows = [sets["train"].rows.values[i * len(sets["train"]) // 2 // pairs]
                  for i in range(pairs)]  # fmt: skip
    name = f"{objective}-{iters}-{pairs}-{layers}-{rate:g}-{seed}"
    train = TrainConfig(
        objective=objective,  # pyright: ignore[reportArgumentType]
        iters=stop or iters,
        batch_size=4,
        val_batches=15,
        steps_per_eval=20,
        steps_per_report=4,
        save_every=5,
        learning_rate=rate,
        seed=seed,
        resume=(work / name / "checkpoints").exists(),
        lr_schedule={"name": "cosine_decay", "arguments": [rate, iters], "warmup": 8},
    )
    report = finetune(
        model,
        tokenizer,
        train_rows,
        sets["valid"].rows.values if objective != "kto" else None,
        train=train,
        dora=DoRAConfig(rank=8, scale=10.0, num_layers=layers),
        preference=PreferenceConfig(),
        adapter_path=work / name,
    )
    tuned = log_probs(model, sets["test"], work / f"{name}-{stop or iters}.npy")
    with disabled(model):  # the base is untouched
        check = row_log_probs(model, *pad_batch([sets["test"][0]], 512), gradient=False)
    assert abs(float(check.total[0]) - base[0, 0, 0]) < 1e-2
    print(json.dumps({
        "bench": "preference", **describe_machine(), "objective": objective,
        "iters": iters, "steps": report.steps, "pairs": pairs, "layers": layers,
        "rate": rate, "seed": seed,
        **compare(base, tuned),
        "curve": [{"step": r.step, "train_loss": r.train_loss, "val_loss": r.val_loss,
                   "metrics": r.metrics} for r in report.history],
        "seconds": report.seconds, "peak_bytes": mx.get_peak_memory(),
    }))  # fmt: skip


if __name__ == "__main__":
    bench  # noqa: B018 - imported for OpenBLAS
    main()
