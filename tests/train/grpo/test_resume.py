"""GRPO runs that are killed and resumed, compared with uninterrupted runs."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.train.killed import GRPO, assert_same_run

PASSES: dict[str, Any] = {"reward": {"num_iterations": 2, "beta": 0.1}}


def samples(folder: Path) -> list[str]:
    return (folder / "samples.jsonl").read_text().splitlines()


def assert_same(first: Path, second: Path) -> None:
    assert_same_run(first, second)
    assert samples(first) == samples(second)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    GRPO.finish(folder)
    return folder


def test_kills_at_random_moments_change_nothing(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    GRPO.kill_at_random(folder, (3, 4), 0.2, random.Random(0))
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
    GRPO.finish(whole, **PASSES)
    # In the second pass over the second sampling.
    GRPO.kill_at_step(folder, 3, 0.0, **PASSES)
    GRPO.finish(folder, resume=True, **PASSES)
    assert_same(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_many_kills_at_random_moments_change_nothing(
    whole: Path, tmp_path: Path, seed: int
) -> None:
    folder = tmp_path / "adapter"
    chance = random.Random(seed)
    steps = [chance.randrange(1, 6) for _ in range(3)]
    GRPO.kill_at_random(folder, steps, 0.3, chance)
    assert_same(whole, folder)
