"""A training stops with a checkpoint before memory ends."""

import re
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig
from mlx_dora.data.batches import pad_batch
from mlx_dora.data.counts import measure_rows
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import target_mask
from mlx_dora.train import TrainConfig, memory, plan_memory
from mlx_dora.train.objectives.make import make_objective
from mlx_dora.train.run import memory_watch as home
from mlx_dora.train.run.memory_watch import MemoryWatch, watch_memory
from tests.cli.training_data import write_data
from tests.processes import run as run_python
from tests.train.conftest import EXAMPLES
from tests.train.saved import log, same_bits, tensors

Run = Callable[..., Any]
BATCH = (mx.zeros((2, 8), mx.int32), mx.zeros((2, 2), mx.int32))


def watch(limit: int = 1 << 40, available: int = 90) -> MemoryWatch:
    return MemoryWatch(
        limit=limit,
        buffers=0,
        advise=lambda peak, fitting: (f"--fit {fitting}",),
        system=lambda: (available, 100),
    )


def test_a_peak_below_the_share_is_no_problem() -> None:
    mx.reset_peak_memory()
    held = mx.zeros((1 << 20,))
    mx.eval(held)
    peak = mx.get_peak_memory()
    enough = watch(limit=peak * 100 // 95 + 1000)
    enough.look([BATCH])
    assert not enough.is_full
    full = watch(limit=peak)
    full.look([BATCH])
    assert full.is_full
    message = str(full.error(7, Path("adapters")))
    assert "is above 95% of its limit of " in message
    assert "after step 7 with a checkpoint in adapters" in message
    assert f"--fit {int(0.95 * peak)}" in message
    assert "\n" not in message
    off = watch(limit=0, available=0)
    off.look([BATCH])
    assert not off.is_full


def test_too_little_of_the_system_left_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enough = watch(available=5)
    enough.look([BATCH])
    assert not enough.is_full
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    short = watch(available=4)
    short.look([BATCH])
    assert short.is_full
    assert "the system has 0.0 MB of 0.0 MB left" in str(short.error(1, Path("a")))
    # What MLX keeps for reuse is given back first.
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 10)
    kept = watch(available=4)
    kept.look([BATCH])
    assert not kept.is_full


def test_kept_buffers_belong_to_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    seen = watch()
    for width in [*range(2, 18)] * 3:
        seen.look([(mx.zeros((2, width), mx.int32), BATCH[1])])
    assert not cleared
    seen.look([(mx.zeros((2, 18), mx.int32), BATCH[1])])
    assert len(cleared) == 1
    assert len(seen.shapes) == 17
    for width in range(2, 18):
        seen.look([(mx.zeros((2, width), mx.int32), BATCH[1])])
    assert len(cleared) == 1


def test_flags_come_from_the_plan_scaled_to_what_was_measured(
    tiny_model_folder: Path,
) -> None:
    dora = DoRAConfig(rank=4, num_layers=-1)
    train = TrainConfig(model=str(tiny_model_folder), batch_size=4, max_seq_length=64)
    sizes = measure_rows(EXAMPLES, 1, 64)
    planned = plan_memory(train, dora, lengths=sizes, limit=1).peak
    light = TrainConfig(
        model=str(tiny_model_folder),
        batch_size=4,
        max_seq_length=64,
        grad_checkpoint=True,
    )
    smaller = plan_memory(light, dora, lengths=sizes, limit=1).peak
    advise = watch_memory(train, dora, EXAMPLES, make_objective(train)).advise
    assert smaller < planned
    # Measured twice the plan: what fits into twice the smaller plan fits.
    assert list(advise(2 * planned, 2 * smaller + 100)) == ["--grad-checkpoint"]
    tight = advise(2 * planned, smaller)
    assert tight[0] == "--grad-checkpoint"
    assert tight[1].startswith("--batch-size ")


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, "--grad-checkpoint"),
        (
            {"grad_checkpoint": True, "grad_accumulation_steps": 3},
            "--batch-size 2 --grad-accumulation-steps 6",
        ),
        (
            {"grad_checkpoint": True, "batch_tokens": 4096},
            "--batch-tokens 2048 --grad-accumulation-steps 2",
        ),
        ({"grad_checkpoint": True, "batch_size": 1}, "--max-seq-length 1024"),
    ],
)
def test_a_model_without_a_plan_gets_smaller_steps(
    settings: dict[str, Any], flags: str
) -> None:
    train = TrainConfig(**settings)  # no model, so no plan
    advise = watch_memory(train, DoRAConfig(), EXAMPLES, make_objective(train)).advise
    assert " ".join(advise(1000, 900)) == flags


def test_reports_count_shapes_and_arrays(run: Run) -> None:
    model, report = run(iters=8, steps_per_report=4, batch_size=2)
    shapes = [entry.batch_shapes for entry in report.history]
    assert shapes[0] <= shapes[1] <= 12
    leaves = tree_flatten(model.parameters())
    assert all(entry.live_arrays > len(leaves) for entry in report.history)
    assert log(report.adapter_path)[0]["batch_shapes"] == shapes[0]


def test_arrays_of_a_step_are_counted_before_it_is_computed(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = mx.ones((3,))
    mx.eval(x)
    assert home.count_arrays([mx.exp(x) + x, {"a": mx.sin(x)}]) == 3
    info = mx.device_info()
    _, report = run("plain", iters=2)
    assert report.history[-1].step_arrays is None
    monkeypatch.setattr(mx, "device_info", lambda *_: {**info, "resource_limit": 10**6})
    _, report = run("counted", iters=2)
    arrays = report.history[-1].step_arrays
    assert arrays > 500
    assert "arrays, of which" not in caplog.text
    monkeypatch.setattr(mx, "device_info", lambda *_: {**info, "resource_limit": 500})
    _, report = run("many", iters=2)
    assert report.history[-1].step_arrays == arrays
    assert f"this step makes {arrays:,} arrays, of which the device holds 500" in (
        caplog.text
    )


def test_memory_of_the_system_ends_a_training(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(home, "system_memory", lambda: (0, 1 << 50))
    with pytest.raises(DoRAError, match=r"the system has .* left, less than 5%"):
        run(iters=5)
    assert (tmp_path / "adapter/checkpoints/1/state.json").exists()


def test_the_command_stops_with_a_checkpoint_that_resumes(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", train=9, valid=3)
    command = [
        *("-m", "mlx_dora", "train", "--model", tiny_model_folder, "--data", data),
        *("--num-layers", "-1", "--iters", "6", "--batch-size", "4", "--seed", "3"),
        *("--max-seq-length", "64", "--save-every", "4", "--steps-per-report", "2"),
    ]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    done = run_python([*command, "--adapter-path", stopped, "--memory-limit", "100000"])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = (text for text in done.stderr.splitlines() if "limit of" in text)
    assert re.search(
        r"MLX's peak of .* is above 95% of its limit of 0\.1 MB: stopped after step 1 "
        r"with a checkpoint in .*stopped\. These flags would fit: ",
        line,
    )
    assert (stopped / "checkpoints" / "1" / "state.json").exists()
    resumed = [*command, "--adapter-path", stopped, "--resume", "--memory-limit", "0"]
    run_python(resumed, check=True)
    run_python([*command, "--adapter-path", whole], check=True)
    assert same_bits(tensors(stopped), tensors(whole))
    assert log(stopped)[-1]["trained_tokens"] == log(whole)[-1]["trained_tokens"]


def test_memory_of_this_system_is_read() -> None:
    found = memory.system_memory()
    if sys.platform in ("linux", "darwin"):
        assert found is not None
        assert 0 < found[0] <= found[1]


def test_a_control_group_may_leave_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memory._group_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert memory._group_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._group_memory(tmp_path) == (300, 1000)
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 250\nslab 3\n")
    assert memory._group_memory(tmp_path) == (550, 1000)
    if sys.platform == "linux":
        monkeypatch.setattr(memory, "_group_memory", lambda: (1, 1000))
        assert memory.system_memory() == (1, 1000)


def test_batches_of_several_arrays_train_as_their_rows_do(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A custom loss may take a tree of arrays, as a trunk of frozen blocks gives."""
    info = mx.device_info()
    monkeypatch.setattr(mx, "device_info", lambda *_: {**info, "resource_limit": 10**6})

    def rows(data: Any, size: int, limit: int, **_: Any) -> Iterator[Any]:
        for index in cycle(range(len(data))):
            yield pad_batch([data[index]] * size, limit)

    def trees(*data: Any, **others: Any) -> Iterator[Any]:
        for tokens, lengths in rows(*data, **others):
            yield (tokens[:, :-1], tokens[:, 1:]), lengths

    def loss(model: Any, batch: Any, lengths: mx.array) -> tuple[mx.array, mx.array]:
        inputs, targets = batch
        mask = target_mask(lengths, targets.shape[1])
        losses = nn.losses.cross_entropy(model(inputs), targets)
        return (losses * mask).sum() / mask.sum(), mask.sum()

    _, plain = run("rows", iters=6, options={"batches": rows})
    _, tree = run("trees", iters=6, options={"batches": trees, "loss": loss})
    assert tree.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
    assert tree.history[-1].batch_shapes == plain.history[-1].batch_shapes == 3
    assert tree.history[-1].step_arrays > 500
