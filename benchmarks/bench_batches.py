"""Measure padding in our batches and mlx-lm's, and the speed of full batches.

``padding`` counts the share of padding in an epoch of a data folder, for our batches
and for those of mlx-lm's own trainer. ``packing`` times the training of short examples
in target tokens per second: in batches of four rows, packed, and in batches of as many
rows of one width as fit into the same number of tokens, after checking that the loss
is the same.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import _harness as bench  # before mlx
import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from _machine import describe_machine

from mlx_dora import DoRAConfig, apply_dora, load
from mlx_dora.data.batches import Batch
from mlx_dora.data.config import DataConfig
from mlx_dora.data.loading import load_datasets
from mlx_dora.data.schedule import Schedule
from mlx_dora.demo.data import write_demo_data
from mlx_dora.demo.model import demo_model
from mlx_dora.evaluate.loss import loss_fn

SHORT = (6, 40)  # tokens per example in the packing case


def waste(batches: Iterator[Any], real: int) -> float:
    """Return the share of the batches' input tokens that is padding."""
    return 1 - real / sum(tokens[:, 1:].size for tokens, _ in batches)


def padding(
    data: str, model: Path, batch_size: int, longest: int, batch_tokens: int
) -> dict[str, Any]:
    """Measure the padding of an epoch; mlx-lm's count leaves out rows that it skips."""
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    _, tokenizer = load(str(model))
    rows = load_datasets(DataConfig(data=data), tokenizer, ("train",))["train"]
    assert rows is not None
    lengths = [min(len(rows[i][0]), longest) for i in range(len(rows))]
    schedule = Schedule(rows, batch_size, longest)
    epoch = schedule.length(1)
    ours = schedule.batches()
    packed = Schedule(rows, batch_size, longest, packing=True)
    filled = Schedule(rows, batch_size, longest, batch_tokens=batch_tokens).usage()
    real = sum(lengths) - len(lengths)

    class Plain:  # called by mlx-lm's cache
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> Any:
            return rows[index]

        def process(self, row: Any) -> Any:
            return row

    theirs = list(iterate_batches(CacheDataset(Plain()), batch_size, longest))
    theirs_real = sum(int((np.array(bounds)[:, 1] - 1).sum()) for _, bounds in theirs)
    rest = packed.batches()
    return {
        "rows": len(rows),
        "median_tokens": int(np.median(lengths)),
        "longest_tokens": max(lengths),
        "waste": round(waste((next(ours) for _ in range(epoch)), real), 4),
        "waste_packed": round(
            waste((next(rest) for _ in range(packed.length(1))), real), 4
        ),
        "waste_mlx_lm": round(waste(iter(theirs), theirs_real), 4),
        "waste_filled": round(filled.padding, 4),
        "batches_filled": filled.batches,
        "shapes_filled": len(filled.shapes),
        "widths": len({next(schedule.batches(i))[0].shape[1] for i in range(epoch)}),
    }


def training(
    model: nn.Module, batches: list[Batch], *, compiles: bool
) -> Callable[[], Any]:
    """Compute the gradients of all batches in turn, as the training loop does."""
    state = [model.state]
    compute = nn.value_and_grad(model, loss_fn)

    def step(*batch: mx.array) -> Any:
        return compute(model, *batch)

    if compiles:
        step = mx.compile(step, inputs=state, outputs=state)

    def run() -> Any:
        total, count = mx.array(0.0), mx.array(0)
        for batch in batches:
            (value, tokens), gradient = step(*batch)
            total, count = total + value * tokens, count + tokens
            mx.eval(total, count, gradient)
        return total / count

    return run


def packing_case(
    smoke: bool, folder: Path | None, blocks: int, length: int, examples: int
) -> Any:
    """The same examples in three kinds of batches, with DoRA of rank 8."""
    model, _ = load(str(folder or demo_model()))
    apply_dora(model, DoRAConfig(rank=8, num_layers=2 if smoke else blocks))
    model.train()
    random = np.random.default_rng(0)
    sizes = random.integers(*SHORT, size=6 if smoke else examples)
    rows = [(random.integers(1, 200, size=n).tolist(), 0) for n in sizes.tolist()]
    runs, counts = {}, {}
    ways: dict[str, Any] = {
        "unpacked": {},
        "packed": {"packing": True},
        "filled": {"batch_tokens": 4 * length},
    }
    for name, way in ways.items():
        schedule = Schedule(rows, 4, length, **way)
        counts[name] = schedule.length(1)
        batches = list(islice(schedule.batches(), counts[name]))
        mx.eval(batches)
        runs[name] = training(model, batches, compiles=name != "packed")
    real = int(sizes.sum() - len(sizes))
    return real, bench.Case(
        name="packing",
        dtype="float32",
        contenders=[
            bench.Contender(name="unpacked", run=runs["unpacked"]),
            *(
                bench.Contender(
                    name=name, run=runs[name], expected=runs["unpacked"], bound=1e-5
                )
                for name in ("packed", "filled")
            ),
        ],
        baseline="unpacked",
        facts={
            "examples": len(sizes),
            "target_tokens": real,
            "max_seq_length": length,
            **{f"batches_{name}": count for name, count in counts.items()},
        },
    )


def by_cpu_time(case: bench.Case, real: int, runs: int) -> None:
    """Print target tokens per second of the process's CPU time, the best of some runs.

    On a machine shared with other jobs this varies less than the time on the clock. Set
    ``OPENBLAS_NUM_THREADS=1``, so that no thread waits for another.
    """
    seconds: dict[str, list[float]] = {c.name: [] for c in case.contenders}
    for _ in range(runs):
        for contender in case.contenders:
            start = time.process_time()
            mx.eval(contender.run())
            seconds[contender.name].append(time.process_time() - start)
    speeds = {name: round(real / min(times), 1) for name, times in seconds.items()}
    facts = {"case": "packing, CPU time", **case.facts, "tokens_per_cpu_s": speeds}
    click.echo(json.dumps({**facts, "runs": runs, **describe_machine()}))


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--only", type=click.Choice(["padding", "packing"]))
@click.option(
    "--data", help="Folder with train.jsonl, for padding (default: the demo's)."
)
@click.option("--model", "folder", type=click.Path(path_type=Path, exists=True))
@click.option("--batch-size", default=4)
@click.option("--max-seq-length", "longest", default=2048)
@click.option("--batch-tokens", default=4096, help="Tokens per batch, for padding.")
@click.option("--pack-to", default=256, help="Tokens per packed row.")
@click.option("--cpu-time", is_flag=True, help="Time packing by CPU time.")
@click.option("--examples", default=64, help="Number of short examples.")
@click.option("--num-layers", "blocks", default=-1)
def main(
    settings: bench.Settings,
    only: str | None,
    data: str | None,
    folder: Path | None,
    batch_size: int,
    longest: int,
    batch_tokens: int,
    pack_to: int,
    examples: int,
    blocks: int,
    cpu_time: bool,
) -> None:
    if only != "packing":
        with tempfile.TemporaryDirectory() as made:
            if data is None:
                write_demo_data(made)
            model = folder or demo_model()
            shares = padding(data or made, model, batch_size, longest, batch_tokens)
        name = Path(data).name if data else "demo"
        facts = {"case": "padding", "data": name, "batch_size": batch_size}
        line = json.dumps({**facts, **shares, **describe_machine()})
        click.echo(line)
        if settings.json_file:
            with settings.json_file.open("a") as file:
                file.write(line + "\n")
    if only != "padding":
        real, case = packing_case(settings.smoke, folder, blocks, pack_to, examples)
        if cpu_time:
            by_cpu_time(case, real, settings.runs)
            return
        measured = bench.measure(case, settings)
        bench.report(measured)
        for name, timing in measured.timings.items():
            speed = real / timing.median_ms * 1e3
            click.echo(f"  {name:24}{speed:11.0f} target tokens/s", err=True)


if __name__ == "__main__":
    main()
