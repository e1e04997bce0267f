"""LoRA, DoRA and full fine-tuning on a classification task: accuracy, not loss alone.

    python benchmarks/label_accuracy.py --data FOLDER --output runs.jsonl

FOLDER has train, valid and test.jsonl of prompt and completion, completions being
labels. Each method trains the demo's model for 120 batches of 8 with every seed; the
measure is the share of test rows whose own label is the likelier. A run is one JSON
line of the output file; runs that stand in it already are not repeated, so a broken-off
comparison goes on where it stopped. A falling loss alone may be the format learnt.
"""

import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import _harness as bench
import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from _machine import describe_machine
from _trunk import Trunk, next_token_logits
from mlx_lm import load

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.demo.model import demo_model
from mlx_dora.evaluate.data import load_datasets
from mlx_dora.evaluate.labels import find_labels
from mlx_dora.evaluate.loss import Loss
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.loop import finetune

RATES = {"lora": 1e-3, "dora": 1e-3, "full": 2e-5}
TARGETS = 4  # a label, the end of the turn, and a line break
LONGEST = 256


def label_loss(frozen: int) -> Loss:
    """Cross-entropy of the last few tokens, on batches of a `Trunk`.

    With prompts masked and answers of at most four tokens it equals the usual loss; a
    third of a step's time would be the 49k-word head on positions that do not count.
    """

    def loss(model: Any, batch: Any, lengths: mx.array) -> tuple[mx.array, mx.array]:
        hidden, tokens = batch
        last = lengths[:, 1:] - 1 - mx.arange(TARGETS)[None]
        mask = last >= lengths[:, :1]
        logits = next_token_logits(model, frozen, hidden, mx.maximum(last - 1, 0))
        targets = mx.take_along_axis(tokens, mx.maximum(last, 0), axis=1)
        losses = mx.where(mask, nn.losses.cross_entropy(logits, targets), 0.0)
        count = mask.sum()
        return losses.sum() / mx.maximum(count, 1), count

    return loss


def run(
    method: str, seed: int, trunk: Trunk, frozen: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Train one model and score it."""
    model, tokenizer, *_ = load(settings["model"])
    config = TrainConfig(
        data=settings["data"],
        fine_tune_type=method,  # pyright: ignore[reportArgumentType] - a choice of click's
        seed=seed,
        batch_size=8,
        iters=settings["iters"],
        learning_rate=settings["rates"][method],
        steps_per_report=20,
        mask_prompt=True,
        max_seq_length=LONGEST,
        val_batches=0,
    )
    train_set = load_datasets(config, tokenizer, ("train",))["train"]
    dora = DoRAConfig(rank=8, scale=2.0, num_layers=settings["num_layers"])
    started = time.perf_counter()
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        finetune(
            model,
            tokenizer,
            train_set,
            None,
            train=config,
            dora=dora,
            adapter_path=Path(folder) / "adapter",
            callback=lambda step: losses.append(getattr(step, "train_loss", None) or 0),
            loss=label_loss(frozen),
            batches=trunk.batches(),
        )
    seconds = time.perf_counter() - started
    return {"train_losses": losses, "train_seconds": round(seconds, 1)} | score(
        model, tokenizer, trunk, frozen, settings
    )


def score(
    model: Any, tokenizer: Any, trunk: Trunk, frozen: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """`mlx_dora.evaluate.labels` on a `Trunk`: the likeliest label, by first token."""
    config = TrainConfig(data=settings["data"], mask_prompt=True)
    data = load_datasets(config, tokenizer, ("test",))["test"]
    assert data is not None
    labels = find_labels(data)
    assert labels is not None
    rows = [
        (data.answer(i), [data.parts(i, label) for label in labels])
        for i in range(len(data))
    ]
    rows = [
        (truth, parts)
        for truth, parts in rows
        if all(len(one.prompt) + len(one.answer) <= LONGEST for one in parts)
    ]
    rows.sort(key=lambda row: len(row[1][0].prompt))
    model.eval()
    chosen: list[str] = []
    for start in range(0, len(rows), 16):
        batch = [parts for _, parts in rows[start : start + 16]]
        assert all(
            len({one.answer[0] for one in parts}) == len(labels) for parts in batch
        )
        prompts = [parts[0].prompt for parts in batch]
        places = mx.array([[len(prompt) - 1] for prompt in prompts])
        hidden = trunk.activations(prompts)
        logits = next_token_logits(model, frozen, hidden, places)[:, 0]
        firsts = mx.array([[one.answer[0] for one in parts] for parts in batch])
        best = mx.argmax(mx.take_along_axis(logits, firsts, axis=1), axis=1)
        chosen += [labels[int(i)] for i in np.array(best)]
    truths = [truth for truth, _ in rows]
    right = sum(one == truth for one, truth in zip(chosen, truths, strict=True))
    return {
        "accuracy": right / len(rows),
        "chosen": Counter(chosen),
        "labels": Counter(truths),
        "test_rows": len(rows),
    }


def summary(lines: list[dict[str, Any]]) -> str:
    """Mean and spread of the accuracy by method."""
    rows = []
    for method in ("base", "lora", "dora", "full"):
        found = [line["accuracy"] for line in lines if line["method"] == method]
        if found:
            spread = f"{min(found):.3f} to {max(found):.3f}"
            rows.append(
                f"  {method:6}{np.mean(found):8.3f}   {spread}   n = {len(found)}"
            )
    return "\n".join(["accuracy on the test set (mean, range over seeds)", *rows])


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@click.option("--data", required=True, help="Folder with the three .jsonl files.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--model", help="A Llama-like model; the demo's if not given.")
@click.option("--iters", default=120, show_default=True)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1))
@click.option("--method", "methods", multiple=True, default=tuple(RATES))
@click.option("--num-layers", default=16, show_default=True)
@click.option(
    "--rate", nargs=2, multiple=True, help="METHOD RATE: another learning rate."
)
def main(
    data: str,
    output: Path,
    model: str | None,
    iters: int,
    seeds: tuple[int, ...],
    methods: tuple[str, ...],
    num_layers: int,
    rate: tuple[tuple[str, str], ...],
) -> None:
    settings = {
        "data": data,
        "model": model or str(demo_model()),
        "iters": iters,
        "num_layers": num_layers,
        "rates": RATES | {name: float(value) for name, value in rate},
    }
    lines = []
    if output.exists():
        lines = [json.loads(line) for line in output.read_text().splitlines()]
    done = {(one["method"], one["seed"], one["learning_rate"]) for one in lines}
    plain: Any
    plain, tokenizer, *_ = load(settings["model"])
    frozen = len(plain.layers) - num_layers
    trunk = Trunk(plain, frozen)
    jobs = [("base", 0), *((m, s) for s in seeds for m in methods)]
    for method, seed in jobs:
        learning_rate = settings["rates"].get(method)
        if (method, seed, learning_rate) in done:
            continue
        if method == "base":
            result = score(plain, tokenizer, trunk, frozen, settings)
        else:
            result = run(method, seed, trunk, frozen, settings)
        facts = {"iters": iters, "batch_size": 8, "num_layers": num_layers, "rank": 8}
        line = {"method": method, "seed": seed, "learning_rate": learning_rate}
        line |= facts | result | {"blas": bench.BLAS.state} | describe_machine()
        lines.append(line)
        with output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        click.echo(f"{method} seed {seed}: accuracy {result['accuracy']:.3f}", err=True)
    click.echo(summary(lines))


if __name__ == "__main__":
    main()
