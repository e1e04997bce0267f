"""Compare training loops: `finetune`, and mlx-lm's LoRA and DoRA in mlx-lm's own loop.

    python benchmarks/bench_train.py [--rank 8] [--weight dense] [--length 128]

The model is the demo's SmolLM2-135M with every linear layer of every block adapted,
trained on 4 rows of 32 or 128 tokens per step with Adam. A step lasts from one request
of the loop for a batch to the next. It therefore includes loss, gradients, update and
everything else that the loop does. The first step of each turn compiles and is left
out. The contenders share the base's weights and start from the same factors. Peak
memory is the model's own memory plus what its loop adds. `bench_model.py --only step`
measures only the gradients, also with gradient checkpointing.
"""

import contextlib
import gc
import io
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import _harness as bench
import click
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from bench_model import LINEARS, SCALE, contenders
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback

from mlx_dora import DoRAConfig
from mlx_dora.train import TrainConfig, finetune
from mlx_dora.train.optimizers import describe_training

ROWS = 4
STEPS = (
    3  # timed steps per turn; an untimed step before compiles, and one ends the last
)
NAMES = ("mlx-lm LoRA", "mlx-lm DoRA", "ours")


class Feed:
    """Gives a loop its batches and records when the loop asks for them."""

    def __init__(self, length: int, vocabulary: int) -> None:
        tokens = (mx.arange(ROWS * (length + 1)) * 7 % vocabulary).reshape(ROWS, -1)
        self._batch = tokens, mx.array([[0, length + 1]] * ROWS)
        self._asked: list[float] = []

    def __call__(self, *_: Any, **__: Any) -> Iterator[Any]:
        """Yield the same batch without end."""
        while True:
            self._asked.append(time.perf_counter())
            yield self._batch

    def step_ms(self) -> list[float]:
        """Return the milliseconds of each step except the first."""
        return [1e3 * float(seconds) for seconds in np.diff(self._asked[1:])]


def run_theirs(model: Any, feed: Feed, config: TrainConfig, folder: Path) -> float:
    """Train with mlx-lm's loop and return the mean loss."""
    losses: list[float] = []

    class Record(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            losses.append(train_info["train_loss"])

    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(
            model,
            optim.Adam(learning_rate=config.learning_rate),
            [None],
            args=trainer.TrainingArgs(
                batch_size=ROWS,
                iters=config.iters,
                adapter_file=str(folder / "adapters.safetensors"),
            ),
            iterate_batches=feed,
            training_callback=Record(),
        )
    return losses[-1]


def run_ours(
    model: Any, feed: Feed, config: TrainConfig, folder: Path, rank: int
) -> float:
    """Train with our loop and return the mean loss."""
    report = finetune(
        model,
        None,
        [([1, 2, 3], 1)],
        None,
        train=config,
        dora=DoRAConfig(rank=rank, scale=SCALE, keys=LINEARS, num_layers=-1),
        adapter_path=folder / "ours",
        batches=feed,
    )
    assert report.train_loss is not None
    return report.train_loss


def measure(
    settings: bench.Settings,
    rank: int,
    quantized: bool,
    length: int,
    folder: Path | None,
) -> bench.Measurement:
    """Run the contenders in turns; each turn is a separate training of a few steps."""
    models = contenders(rank, quantized, settings.smoke, folder)
    vocabulary = models["base"]["model"].embed_tokens.weight.shape[0]
    config = TrainConfig(iters=STEPS + 2, batch_size=ROWS, overwrite=True)
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    extra, losses = {}, {}
    for turn in range(-(-settings.runs // STEPS)):
        first = turn % len(NAMES)
        for name in (*NAMES[first:], *NAMES[:first]):
            feed = Feed(length, vocabulary)
            gc.collect()
            mx.clear_cache()
            alive = mx.get_active_memory()
            mx.reset_peak_memory()
            with tempfile.TemporaryDirectory() as scratch:
                place = Path(scratch)
                if name == "ours":
                    loss = run_ours(models[name], feed, config, place, rank)
                else:
                    loss = run_theirs(models[name], feed, config, place)
            # Later turns start with the memory that earlier loops still hold.
            extra.setdefault(name, mx.get_peak_memory() - alive)
            losses.setdefault(name, loss)
            times[name] += feed.step_ms()
    error = abs(losses["ours"] / losses["mlx-lm DoRA"] - 1)
    if not error < 1e-3:
        raise click.ClickException(f"the losses of the two DoRAs differ: {losses}")
    timings = {}
    for name in NAMES:
        p20, median, p80 = np.percentile(times[name], [20, 50, 80])
        timings[name] = bench.Timing(
            median_ms=round(float(median), 3),
            p20_ms=round(float(p20), 3),
            p80_ms=round(float(p80), 3),
            peak_bytes=_size(models[name]) + extra[name],
            transient_bytes=extra[name],
            error=error if name == "ours" else None,
        )
    recorded = describe_training(config)
    kept = ("optimizer", "optimizer_config", "learning_rate")
    model = "tiny" if settings.smoke else "SmolLM2-135M"
    case = bench.Case(
        name=f"{model} training loop",
        dtype="float32",
        contenders=[],
        baseline="mlx-lm LoRA",
        facts={
            "weight": "4-bit" if quantized else "dense",
            "rank": rank,
            "tokens": ROWS * length,
            "time_target": round(1.05 + rank / (2 * ROWS * length), 3),
            "optimizer": json.dumps({name: recorded[name] for name in kept}),
        },
    )
    settings = replace(settings, warmups=1)  # each turn's compiling step
    return bench.Measurement(case=case, settings=settings, timings=timings)


def _size(model: Any) -> int:
    # Live memory includes all models and what mlx-lm's compiled steps still hold.
    flat = dict(tree_flatten(model.parameters()))
    return sum(value.nbytes for value in flat.values())


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option(
    "--rank", "ranks", type=int, multiple=True, help="Ranks (default: 8 and 64)."
)
@click.option("--weight", type=click.Choice(["dense", "4-bit"]))
@click.option(
    "--length",
    "lengths",
    type=int,
    multiple=True,
    help="Tokens per row (default: 32 and 128).",
)
@click.option("--model", "folder", type=click.Path(path_type=Path, exists=True))
def main(
    settings: bench.Settings,
    ranks: tuple[int, ...],
    weight: str | None,
    lengths: tuple[int, ...],
    folder: Path | None,
) -> None:
    smoke = settings.smoke
    for quantized in (False, True):
        if weight and (weight == "4-bit") != quantized:
            continue
        for rank in ranks or ((4,) if smoke else (8, 64)):
            for length in lengths or ((8,) if smoke else (32, 128)):
                bench.report(measure(settings, rank, quantized, length, folder))


if __name__ == "__main__":
    main()
