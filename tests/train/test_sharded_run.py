"""Divided weights: loading, resuming, and processes that die or stop."""

import json
import re
import signal
import time
from pathlib import Path

import pytest

from mlx_dora.train.peers import PATIENCE
from tests.checks import assert_close, to_numpy
from tests.cli.training_data import write_data
from tests.processes import run
from tests.train import ring
from tests.train.killed import PLAIN, assert_same_run
from tests.train.saved import log, tensors

MB = 1 << 20


@pytest.fixture
def arguments(tiny_model_folder: Path, tmp_path: Path) -> list[str]:
    data = write_data(tmp_path / "data", train=9, valid=5, test=5)
    return [
        *("-m", "mlx_dora", "train", "--model", str(tiny_model_folder)),
        *("--data", str(data), "--num-layers", "1", "--learning-rate", "1e-2"),
        *("--iters", "4", "--steps-per-report", "1", "--batch-size", "4", "--test"),
        *("--train", "--max-seq-length", "64", "--save-every", "2"),
    ]


def test_the_command_trains_like_a_single_process(
    arguments: list[str], tmp_path: Path
) -> None:
    there, alone = tmp_path / "ring", tmp_path / "alone"
    command = [*arguments, "--shard", "full", "--adapter-path", str(there)]
    (code, errors), other = ring.both(tmp_path, command, command)
    assert (code, other[0]) == (0, 0), errors + other[1]
    assert "each of 2 processes holds 1/2 of the rows of 15 modules" in errors
    run([*arguments, "--adapter-path", str(alone)], check=True)
    total = re.compile(r"Trainable: ([\d,]+) of ([\d,]+)")
    for expected, line in zip(log(alone), log(there), strict=True):
        for name in {"train_loss", "val_loss"} & line.keys():
            assert line[name] == pytest.approx(expected[name], rel=1e-5), name
    assert total.search(errors)
    weights = tensors(alone)
    for name, value in tensors(there).items():
        assert_close(value, to_numpy(weights[name]), bound=2e-4)
    # The adapter records the same base: it attaches to the whole model.
    run([*arguments[:7], "--test", "--adapter-path", str(there)], check=True)
    recorded = [
        json.loads((folder / "adapter_config.json").read_text())["mlx_dora"]["base"]
        for folder in (alone, there)
    ]
    assert recorded[0] == recorded[1]


def test_killed_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    settings = {"shard": "full", "iters": 12}
    for code, errors in ring.both(tmp_path, *[PLAIN.words(whole, **settings)] * 2):
        assert code == 0, errors
    with ring.started(tmp_path, *[PLAIN.words(folder, **settings)] * 2) as processes:
        assert processes[0].stdout is not None
        for _ in range(5):  # updates of two batches; saved at batches 4 and 8
            assert processes[0].stdout.readline()
        for process in processes:
            process.send_signal(signal.SIGKILL)
    resumed = PLAIN.words(folder, **settings, resume=True)
    for code, errors in ring.both(tmp_path, resumed, resumed):
        assert code == 0, errors
    assert_same_run(whole, folder)


def test_a_run_moves_from_one_process_to_two_and_back(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    run(PLAIN.words(whole, dropout=0.0, iters=12), check=True)
    run(PLAIN.words(folder, dropout=0.0, iters=4), check=True)
    two = PLAIN.words(folder, dropout=0.0, iters=8, resume=True, shard="full")
    (code, errors), (other, _) = ring.both(tmp_path, two, two)
    assert (code, other) == (0, 0), errors
    assert "processes was 1, is 2; shard was null, is" in errors
    assert "up to rounding, not bit for bit" in errors
    back = run(PLAIN.words(folder, dropout=0.0, iters=12, resume=True), check=True)
    assert "processes was 2, is 1" in back.stderr
    assert len(log(folder)) == len(log(whole))
    for expected, line in zip(log(whole), log(folder), strict=True):
        for name in {"train_loss", "val_loss"} & line.keys():
            assert line[name] == pytest.approx(expected[name], rel=1e-4), name
    weights = tensors(whole)
    for name, value in tensors(folder).items():
        # Adam's first steps amplify the rounding of gradients near 0.
        assert_close(value, to_numpy(weights[name]), bound=1e-3)


def endless(arguments: list[str], folder: Path) -> list[str]:
    more = ("--shard", "full", "--iters", "100000", "--adapter-path", str(folder))
    return [*arguments, *more]


def until_saved(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("[0-9]*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def resumes(arguments: list[str], folder: Path) -> None:
    """The last checkpoint is whole: training goes on from it, on a single process."""
    steps = [int(p.name) for p in (folder / "checkpoints").glob("[0-9]*")]
    more = ("--resume", "--iters", str(max(steps) + 1), "--adapter-path", str(folder))
    resumed = run([*arguments, *more])
    assert resumed.returncode == 0, resumed.stderr
    assert f"Resuming from step {max(steps)}" in resumed.stderr


@pytest.mark.parametrize(
    ("shard", "processes"),
    [("full", 2), ("tensor", 2), pytest.param("full", 4, marks=pytest.mark.slow)],
)
def test_a_killed_process_ends_the_others_with_a_line_that_names_it(
    arguments: list[str], tmp_path: Path, processes: int, shard: str
) -> None:
    folder = tmp_path / "out"
    command = [*endless(arguments, folder), "--shard", shard]
    with ring.started(tmp_path, *[command] * processes) as started:
        until_saved(folder)
        started[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        _, errors = started[0].communicate(timeout=100)
        for process in started[2:]:
            process.communicate(timeout=100)
        seconds = time.monotonic() - began
    # PATIENCE, and what a busy machine adds.
    assert seconds < PATIENCE + 10
    assert [process.returncode for process in started if process is not started[1]] == [
        1
    ] * (processes - 1)
    # MLX's ring may still write a line of its own.
    (last,) = (line for line in errors.splitlines() if line.startswith("Error: "))
    # In a ring of four, a neighbor of the killed process may have ended too.
    assert re.search(r"process (\d, )*1(, \d)* of this training has ended", last), (
        errors
    )
    assert "--resume" in last
    resumes(arguments, folder)


def test_a_stopped_process_ends_the_other_after_the_timeout(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_DORA_PEER_TIMEOUT", "4")
    folder = tmp_path / "out"
    with ring.started(tmp_path, *[endless(arguments, folder)] * 2) as (first, second):
        until_saved(folder)
        second.send_signal(signal.SIGSTOP)
        _, errors = first.communicate(timeout=60)
        second.send_signal(signal.SIGCONT)
    assert first.returncode == 1
    last = errors.splitlines()[-1]
    assert "process 1 of this training has given no sign of life for 4 seconds" in last
    resumes(arguments, folder)
