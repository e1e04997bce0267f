"""Training with two processes."""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checks import assert_close, to_numpy
from tests.cli.training_data import write_data
from tests.processes import run
from tests.train import ring
from tests.train.killed import PLAIN, assert_same_run
from tests.train.saved import log, tensors

Run = Callable[..., Any]


@pytest.fixture
def arguments(tiny_model_folder: Path, tmp_path: Path) -> list[str]:
    data = write_data(tmp_path / "data", train=9, valid=5, test=5)
    return [
        *("-m", "mlx_dora", "train", "--model", str(tiny_model_folder)),
        *("--data", str(data), "--num-layers", "1", "--learning-rate", "1e-2"),
        *("--iters", "5", "--steps-per-report", "1", "--batch-size", "4", "--test"),
        *("--train", "--max-seq-length", "64", "--save-every", "2"),
    ]


@pytest.mark.parametrize(
    "variant",
    [
        "dora",
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("bidora", "doran-aux")),
    ],
)
def test_mlx_launch_trains_like_a_single_process(
    arguments: list[str], tmp_path: Path, variant: str
) -> None:
    arguments = [*arguments, "--variant", variant]
    ring_folder, alone = tmp_path / "ring", tmp_path / "alone"
    launched = ring.launch([*arguments, "--adapter-path", str(ring_folder)])
    single = run([*arguments, "--adapter-path", str(alone)], check=True)
    assert "Next:" in launched.stdout, launched.stdout + launched.stderr

    # Loss, perplexity and tokens, from the first process alone.
    pattern = r"^Test loss (\S+), perplexity (\S+) \((\d+) tokens\)\.$"
    tested = re.findall(pattern, launched.stdout, re.MULTILINE)
    expected = re.findall(pattern, single.stdout, re.MULTILINE)
    assert len(tested) == len(expected) == 1
    for value, wanted in zip(tested[0], expected[0], strict=True):
        assert float(value) == pytest.approx(float(wanted), rel=1e-4)
    assert launched.stderr.count("step 1/5") == 1
    expected_log, ring_log = log(alone), log(ring_folder)
    assert len(expected_log) == len(ring_log) == 7
    for expected, line in zip(expected_log, ring_log, strict=True):
        assert line.keys() == expected.keys()
        for name in {"train_loss", "val_loss", "delta_m", "delta_d"} & line.keys():
            assert line[name] == pytest.approx(expected[name], rel=1e-4), name
        assert line["trained_tokens"] == expected["trained_tokens"]
    weights = tensors(alone)
    for name, value in tensors(ring_folder).items():
        # Adam's first steps amplify the rounding of gradients near 0.
        assert_close(value, to_numpy(weights[name]), bound=2e-4)
    assert {path.name for path in alone.iterdir()} == {
        path.name for path in ring_folder.iterdir()
    }


def test_killed_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    for code, errors in ring.both(tmp_path, *[PLAIN.words(whole, iters=12)] * 2):
        assert code == 0, errors
    with ring.started(tmp_path, *[PLAIN.words(folder, iters=12)] * 2) as processes:
        assert processes[0].stdout is not None
        for _ in range(5):  # updates of two batches; saved at batches 4 and 8
            assert processes[0].stdout.readline()
        for process in processes:
            process.send_signal(signal.SIGKILL)
    # The second machine may have another disk, without the checkpoints.
    elsewhere = tmp_path / "elsewhere"
    resumed = [
        PLAIN.words(place, iters=12, resume=True) for place in (folder, elsewhere)
    ]
    for code, errors in ring.both(tmp_path, *resumed):
        assert code == 0, errors
    assert_same_run(whole, folder)
    assert not elsewhere.exists()
    process = run(PLAIN.words(folder, resume=True, iters=14))
    assert process.returncode == 0
    assert "processes was 2, is 1" in process.stderr
    assert "up to rounding, not bit for bit; dropout draws other" in process.stderr


def test_an_error_in_one_process_ends_all_with_one_line(
    arguments: list[str], tmp_path: Path
) -> None:
    arguments = [*arguments, "--quiet"]
    there = [*arguments, "--adapter-path", str(tmp_path / "out")]
    other = [*there, "--data", str(tmp_path / "nowhere")]
    (first, errors), (second, silence) = ring.both(tmp_path, there, other)
    assert (first, second, silence) == (1, 1, "")
    (error,) = (line for line in errors.splitlines() if line.startswith("Error: "))
    assert error.startswith("Error: process 1: ")
    assert "nowhere does not exist" in errors

    (first, errors), (second, silence) = ring.both(
        tmp_path, there, [*there, "--iters", "7"]
    )
    assert (first, second, silence) == (1, 1, "")
    assert "iters is 5 in process 0 and 7 here" in errors

    # Only the first process, which writes the folder, checks it.
    (tmp_path / "file").touch()
    taken = [*arguments, "--adapter-path", str(tmp_path / "file")]
    (first, errors), (second, silence) = ring.both(tmp_path, taken, there)
    assert (first, second, silence) == (1, 1, "")
    assert errors.splitlines()[-1].startswith("Error: adapter_path ")
    assert not (tmp_path / "out").exists()


def test_a_stopped_process_ends_the_other_after_the_timeout(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_DORA_PEER_TIMEOUT", "4")
    endless = [*arguments, "--adapter-path", str(tmp_path / "out"), "--iters", "100000"]
    with ring.started(tmp_path, endless, endless) as (first, second):
        assert first.stderr is not None
        while not first.stderr.readline().startswith("step "):
            assert first.poll() is None
        second.send_signal(signal.SIGSTOP)
        _, errors = first.communicate(timeout=60)
        second.send_signal(signal.SIGCONT)
    assert first.returncode == 1
    last = errors.splitlines()[-1]
    assert "process 1 of this training has given no sign of life for 4 seconds" in last
    assert "--resume" in last


def test_ctrl_c_in_one_process_ends_all_and_saves(
    arguments: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    endless = [*arguments, "--adapter-path", str(folder), "--iters", "100000"]
    with ring.started(tmp_path, endless, endless) as (first, second):
        assert first.stderr is not None
        while "  loss " not in first.stderr.readline():  # before it, nothing is saved
            assert first.poll() is None
        second.send_signal(signal.SIGINT)
        _, errors = first.communicate(timeout=60)
        _, silence = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (130, 130)
    assert "stopped after step" in errors
    assert not [line for line in silence.splitlines() if not line.startswith("[ring]")]
    assert (folder / "adapters.safetensors").exists()
