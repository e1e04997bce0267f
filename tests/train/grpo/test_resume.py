"""GRPO runs that are killed and resumed, compared with uninterrupted runs."""

import json
import random
import signal
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytest

from tests.processes import Process
from tests.train.run.test_resume import assert_same_run

PASSES: dict[str, Any] = {"reward": {"num_iterations": 2, "beta": 0.1}}


def start(folder: Path, **settings: Any) -> Process:
    return Process(["-m", "tests.train.grpo.resumable", folder, json.dumps(settings)])


def finish(folder: Path, **settings: Any) -> None:
    process = start(folder, **settings)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def kill(folder: Path, step: int, wait: float, **settings: Any) -> None:
    process = start(folder, resume=True, **settings)
    assert process.stdout is not None
    for _ in range(step):
        if not process.stdout.readline():
            break
    try:
        process.wait(wait)
    except TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate()


def samples(folder: Path) -> list[str]:
    return (folder / "samples.jsonl").read_text().splitlines()


def assert_same(first: Path, second: Path) -> None:
    assert_same_run(first, second)
    assert samples(first) == samples(second)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    finish(folder)
    return folder


def test_kills_at_random_moments_change_nothing(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    chance = random.Random(0)
    for step in (3, 4):
        kill(folder, step, chance.uniform(0, 0.2))
    finish(folder, resume=True)
    assert_same(whole, folder)
    rows = [json.loads(line) for line in samples(folder)]
    trained = [row for row in rows if row["set"] == "train"]
    # 4 windows an epoch of 5 prompts... each prompt of a window 3 times.
    assert {row["step"] for row in trained} == {*range(0, 16, 2)}
    assert {row["step"] for row in rows if row["set"] == "valid"} == {0, 6, 12, 16}
    for row in trained:
        assert row["reward"] == pytest.approx(
            sum(value for value in row["rewards"].values() if value is not None)
        )


def test_a_kill_between_passes_changes_nothing(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "adapter"
    finish(whole, **PASSES)
    kill(folder, 3, 0.0, **PASSES)  # in the second pass over the second sampling
    finish(folder, resume=True, **PASSES)
    assert_same(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_many_kills_at_random_moments_change_nothing(
    whole: Path, tmp_path: Path, seed: int
) -> None:
    folder = tmp_path / "adapter"
    chance = random.Random(seed)
    for _ in range(3):
        kill(folder, chance.randrange(1, 6), chance.uniform(0, 0.3))
    finish(folder, resume=True)
    assert_same(whole, folder)
