"""Measure the cheap figures of docs/figures.md again and compare them with the pages.

    python benchmarks/figures.py [F4 F6 ...]

Each line shows an id, what was measured, the figure of the pages, the figure of this
run, and the tolerance. Sums over counted things must be equal; for times, the tolerance
allows for another or a busy machine. The exit code is 1 if a figure is outside its
tolerance.
"""

import _harness as bench  # isort: skip - before mlx

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import bench_batches
import bench_merge
import kernel_floors
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora import DoRAConfig, DoRALinear
from mlx_dora.demo.data import write_demo_data
from mlx_dora.demo.model import demo_model
from mlx_dora.io.json import read_object
from mlx_dora.train import TrainConfig, plan_memory
from mlx_dora.train.plan import hub_models
from mlx_dora.train.plan.attention import Device, metal_device
from mlx_dora.train.plan.shapes import build_empty, shapes_of
from mlx_dora.train.plan.step import plan_step

ROOT = Path(__file__).parent.parent
PRODUCT = """
import {first}
import time
import mlx.core as mx
x = mx.random.normal((1024, 1024))
mx.eval(x @ x)
start = time.perf_counter()
mx.eval(x @ x)
print(time.perf_counter() - start)
"""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of a page, as found now.

    Attributes:
        what: What was measured.
        page: The figure as the page has it.
        now: The figure of this run.
        least, most: What is within tolerance.
    """

    what: str
    page: float
    now: float
    least: float
    most: float


def number(page: str, pattern: str) -> float:
    """Return the number that the group of a pattern finds on a page."""
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"{page} has no text like {pattern!r}")
    return float(match[1].replace(",", ""))


def blas() -> Iterator[Figure]:
    """F4: a float32 product with OpenBLAS, and with MLX's own BLAS."""

    def seconds(first: str) -> float:
        script = PRODUCT.format(first=first)
        done = subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True
        )
        return float(done.stdout)

    page = number("README.md", r"about (\d+) times faster")
    ratio = seconds("os") / seconds("mlx_dora")
    yield Figure(
        what="MLX's BLAS ÷ OpenBLAS", page=page, now=ratio, least=page / 4, most=1e4
    )


def padding() -> Iterator[Figure]:
    """F6: the share of padding in batches of the demo's data."""
    row = r"the demo's \(docstrings\) \|[^|]*\|[^|]*"
    percent = r"\| ([\d.]+) % "
    with tempfile.TemporaryDirectory() as data:
        write_demo_data(data)
        shares = bench_batches.padding(data, demo_model(), 4, 2048, 4096)
    names = ("waste_filled", "waste", "waste_packed", "waste_mlx_lm")
    for at, name in enumerate(names):
        page = number("docs/training.md", row + r"\| [\d.]+ % " * at + percent)
        now = 100 * shares[name]  # docstrings differ between versions of Python
        yield Figure(
            what=f"{name}, percent", page=page, now=now, least=page - 2, most=page + 2
        )


def merge() -> Iterator[Figure]:
    """F12: a merge of two adapters, against dense weights and an SVD."""
    pattern = r"([\d.]+) ms against ([\d.]+) ms"
    fast = number("docs/merging.md", pattern)
    slow = number("docs/merging.md", pattern.replace("(", "", 1).replace(")", "", 1))
    case = bench_merge.case("q_proj", bench_merge.SHAPES["q_proj"], 16, 2)
    times = []
    for contender in case.contenders:
        mx.eval(contender.run())
        start = time.perf_counter()
        mx.eval(contender.run())
        times.append(time.perf_counter() - start)
    yield Figure(
        what="dense and SVD ÷ ours",
        page=slow / fast,
        now=times[1] / times[0],
        least=slow / fast / 5,
        most=slow / fast * 5,
    )


def plan() -> Iterator[Figure]:
    """F16: predicted peaks; the measured ones need `bench_plan.py`."""
    for tokens, rows, rank, blocks in ((64, 2, 8, 4), (128, 4, 64, -1)):
        shown = "all" if blocks == -1 else blocks
        page = number(
            "docs/memory.md",
            rf"\| {tokens} \| {rows} \| {rank} \| {shown} \| no \| float32 \| dora "
            r"\| (\d+) ",
        )
        train = TrainConfig(
            model=str(demo_model()), batch_size=rows, max_seq_length=tokens
        )
        peak = plan_memory(train, DoRAConfig(rank=rank, num_layers=blocks)).peak / 1e6
        yield Figure(
            what=f"{tokens} x {rows}, rank {rank}: MB",
            page=page,
            now=peak,
            least=page * 0.99,
            most=page * 1.01,
        )


def rounding() -> Iterator[Figure]:
    """F22: a bfloat16 layer against float64."""
    from mlx_lm.tuner.dora import DoRALinear as TheirDoRA

    mx.random.seed(0)
    base = nn.Linear(1024, 1024)
    base.set_dtype(mx.bfloat16)
    x = mx.random.normal((64, 1024)).astype(mx.bfloat16)
    for name, kind in (("ours", DoRALinear), ("mlx-lm's", TheirDoRA)):
        layer = kind.from_base(base, r=8, dropout=0.0, scale=2.0)
        layer.lora_b = mx.random.normal((8, 1024), key=mx.random.key(1)) * 0.02
        layer.m = layer.m * (1 + 0.003 * mx.random.normal(layer.m.shape))
        layer.train()
        exact = [
            np.array(value.astype(mx.float32), dtype=np.float64)
            for value in (
                base.weight, layer.lora_a, layer.lora_b, layer.m, x, base.bias,
            )
        ]  # fmt: skip
        weight, lora_a, lora_b, m, inputs, bias = exact
        summed = weight + 2.0 * (lora_a @ lora_b).T
        scale = m / np.linalg.norm(summed, axis=1)
        truth = inputs @ (scale[:, None] * summed).T + bias
        found = np.array(layer(x).astype(mx.float32), dtype=np.float64)
        error = np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2))
        word = "result" if name == "ours" else "mlx-lm"
        page = number("docs/method.md", rf"{word} is ([\d.]+)e-3 from float64")
        yield Figure(
            what=f"{name}: error in thousandths",
            page=page,
            now=1e3 * error,
            least=page * 0.9,
            most=page * 1.1,
        )


def floors() -> Iterator[Figure]:
    """F25: the table of calculated floors, row by row."""
    page = (ROOT / "metal" / "README.md").read_text(encoding="utf-8")
    for name, moved, _ in kernel_floors.rows():
        row = re.search(rf"\| {re.escape(name)} \| ([\d.]+) \|", page)
        stated = float(row[1]) if row else float("nan")
        yield Figure(
            what=f"{name}: MB",
            page=stated,
            now=round(moved / 1e6, 1),
            least=stated,
            most=stated,
        )


def mac() -> Iterator[Figure]:
    """F52: the plan of long rows on the CPU and on a Mac."""
    configs = read_object(Path(hub_models.__file__).with_name("hub_models.json"))
    devices = (Device(kind="cpu"), metal_device("0.32.4"))
    train = TrainConfig(batch_size=4, max_seq_length=8193, grad_checkpoint=True)
    for shown, name in MAC_MODELS.items():
        config = configs[name]
        empty = build_empty(config, name)
        shapes = shapes_of(empty, config, DoRAConfig(rank=8, num_layers=16), "dora")
        cells = [r"([\d.]+) GB"] * 4
        plans = [plan_step(shapes, train, 1 << 60, device) for device in devices]
        values = [v / 1e9 for plan in plans for v in (plan.scores, plan.peak)]
        for at, now in enumerate(values):
            row = [c.replace("(", "(?:") if i != at else c for i, c in enumerate(cells)]
            page = number("docs/memory.md", rf"\| {shown}[^|]*\| " + r" \| ".join(row))
            yield Figure(
                what=f"{shown}, column {at + 1}: GB",
                page=page,
                now=now,
                least=page - 0.06,
                most=page + 0.06,
            )


MAC_MODELS = {
    "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "Llama-3.2-1B": "meta-llama/Llama-3.2-1B-Instruct",
    "Qwen3-8B": "Qwen/Qwen3-8B",
    "gemma-2-9b": "google/gemma-2-9b-it",
}
CHEAP: dict[str, Callable[[], Iterator[Figure]]] = {
    "F4": blas,
    "F6": padding,
    "F12": merge,
    "F16": plan,
    "F22": rounding,
    "F25": floors,
    "F52": mac,
}


def main() -> int:
    names = sys.argv[1:] or list(CHEAP)
    failed = 0
    for name in names:
        if name not in CHEAP:
            raise SystemExit(f"{name} is not among {', '.join(CHEAP)}")
        for figure in CHEAP[name]():
            fits = figure.least <= figure.now <= figure.most
            failed += not fits
            print(
                f"{name:4} {figure.what:36} page {figure.page:9.4g}  "
                f"now {figure.now:9.4g}  [{figure.least:.4g}, {figure.most:.4g}]"
                f"{'' if fits else '  OUTSIDE'}"
            )
    return 1 if failed else 0


if __name__ == "__main__":
    assert bench.BLAS.message
    sys.exit(main())
