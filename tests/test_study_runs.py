"""The study's shortcuts are exact, and a run depends on nothing but its settings."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.surgery import apply_layers
from mlx_dora.data.batches import pad_batch
from mlx_dora.evaluate.loss import loss_fn
from tests.processes import ROOT

BENCHMARKS = ROOT / "benchmarks"
START = [7, 3, 9]
ROWS = [
    ([*START, 5, 7, 9, 11, 13, 2], 5),
    ([*START, 6, 8], 4),
    ([*START, 1, 4, 1, 5, 9, 2, 6, 5, 3], 11),
    ([*START, 5, 7, 8, 8, 8, 8, 8, 8], 6),
]


def run(script: str) -> str:
    """Run Python code among the benchmarks, in a process without MLX; its output."""
    command, paths = [sys.executable, "-c", script], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=BENCHMARKS,
        env=os.environ | paths,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import _packed  # pyright: ignore[reportMissingImports]

    yield _packed
    sys.modules.pop("_packed")


@pytest.fixture
def deep_model(make_tiny_model: Callable[..., nn.Module]) -> Any:
    model = make_tiny_model(num_hidden_layers=4)
    model.freeze()
    return model


def adapt(model: Any, kind: str) -> None:
    """Make the last two blocks trainable, with values that are all in use."""
    if kind == "full":
        for block in model.layers[2:]:
            block.unfreeze()
        return
    apply_layers(model, DoRAConfig(rank=4, scale=2.0, num_layers=2), kind)  # pyright: ignore[reportArgumentType]
    mx.random.seed(1)
    model.update(
        tree_map(
            lambda p: p + 0.1 * mx.random.normal(p.shape), model.trainable_parameters()
        )
    )


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_packed_rows_give_the_usual_loss_and_gradient(
    packed: Any, deep_model: Any, kind: str
) -> None:
    rows = packed.Packed(deep_model, 2, ROWS)
    adapt(deep_model, kind)
    (ours, count), gradient = nn.value_and_grad(deep_model, packed.packed_loss(2))(
        deep_model, rows.batch(ROWS), mx.array(4 + 1 + 1 + 5)
    )
    (usual, usual_count), usual_gradient = nn.value_and_grad(deep_model, loss_fn)(
        deep_model, *pad_batch(ROWS, 99)
    )
    assert count.item() == usual_count.item()
    assert ours.item() == pytest.approx(usual.item(), rel=1e-6)
    names, values = zip(*tree_flatten(gradient), strict=True)
    expected = dict(tree_flatten(usual_gradient))
    assert {*names} == {*expected}
    difference = sum(
        float(mx.square(value - expected[name]).sum())
        for name, value in zip(names, values, strict=True)
    )
    square = sum(float(mx.square(value).sum()) for value in expected.values())
    assert all(float(mx.abs(value).max()) > 0 for value in values)
    assert difference**0.5 < 1e-6 * square**0.5


def test_the_bits_of_a_batch_do_not_depend_on_earlier_ones(
    packed: Any, deep_model: Any, tmp_path: Path
) -> None:
    def bits(rows: Any) -> bytes:
        batch = rows.batch([ROWS[2], ROWS[0]])
        return np.array(packed.target_logits(deep_model, 2, batch)).tobytes()

    file = tmp_path / "outputs.npy"
    first = packed.Packed(deep_model, 2, ROWS, file)
    expected = bits(first)
    first.batch(ROWS[1:])
    assert bits(first) == expected
    assert bits(packed.Packed(deep_model, 2, ROWS)) == expected
    before = file.stat().st_mtime_ns
    assert bits(packed.Packed(deep_model, 2, ROWS, file)) == expected
    assert file.stat().st_mtime_ns == before  # read, not computed again
    np.save(file, 2 * np.load(file))
    assert bits(packed.Packed(deep_model, 2, ROWS, file)) != expected


RUNS = """
import sys
sys.path.insert(0, "when")
import _harness
import mlx.core as mx
import json
from pathlib import Path
mx.disable_compile()
import train
from grid import Cell, Job
from mlx_dora.evaluate.loss import evaluate_loss
from mlx_dora.adapters.hosting import load
from mlx_dora.errors import DoRAError

bench = train.Bench(Path(DATA), Path(MODEL))
def job(method, rank=0, place=4):
    return Job(Cell("topics", "dense", method, rank, steps=6), place, 3)
first = bench.run(job("dora", 2), with_geometry=True)
others = [bench.run(job(*a), with_geometry=False)
    for a in (("lora", 2), ("direction", 2), ("magnitude",), ("full",))]
assert bench.run(job("dora", 2), with_geometry=True) == first
assert len({line["digest"] for line in (first, *others)}) == 5
assert all(line["valid_loss"] < bench.untrained for line in (first, *others))
model, _ = load(Path(MODEL))
rows = bench.rows["valid"]
usual = evaluate_loss(model, rows, batch_size=4, max_seq_length=99, num_batches=-1)
assert abs(bench.untrained / usual.loss - 1) < 1e-6, (bench.untrained, usual.loss)
assert len(first["row_losses"]) == len(bench.test_targets) == 12
mean = sum(first["row_losses"]) / sum(bench.test_targets)
assert abs(mean / first["test_loss"] - 1) < 1e-4
assert len(first["geometry"]) == 14
assert first["skipped_steps"] == 0
# The same steps lead nowhere at an absurd rate, which is an outcome of its own.
lost = bench.run(job("full", place=120), with_geometry=False)
assert lost["valid_loss"] is None, lost
assert "finite" in lost["failure"] or "NaN" in lost["failure"], lost
def broken(*_, **__): raise DoRAError("the disk is full")
train.finetune = broken
try:
    bench.run(job("dora", 2), with_geometry=False)
except DoRAError:
    pass
else:
    raise AssertionError("an error that is no outcome was recorded as one")
print(json.dumps(first))
"""


@pytest.mark.parametrize("bits", [None, 4])
def test_a_run_repeats_to_the_bit_after_runs_of_other_methods(
    make_tiny_folder: Callable[..., Path], tmp_path: Path, bits: int | None
) -> None:
    model = make_tiny_folder(bits=bits)
    sizes = {"train": 20, "valid": 10, "test": 12}
    for number, (split, size) in enumerate(sizes.items()):
        rows = [
            {"prompt": f"dog {i}{number}", "completion": f" fox {i}" * (1 + i % 3)}
            for i in range(size)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    script = RUNS.replace("DATA", repr(str(tmp_path)))
    script = script.replace("MODEL", repr(str(model)))
    lines = []
    for _ in range(2):  # the second process reads the stored activations
        lines.append(run(script))
    assert lines[0] == lines[1]
    assert all(len(str(loss)) < 12 for loss in json.loads(lines[0])["row_losses"])


def test_lines_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    script = """
import sys
sys.path.insert(0, "when")
import run
from pathlib import Path
for number in range(200):
    run.append_line(Path(FILE), {"writer": WRITER, "text": WRITER * 9000})
"""
    file = tmp_path / "lines.jsonl"
    script = script.replace("FILE", repr(str(file)))
    with ThreadPoolExecutor() as pool:
        list(pool.map(run, (script.replace("WRITER", repr(name)) for name in "ab")))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 400
    assert all({*line["text"]} == {line["writer"]} for line in lines)
