"""Study 2: which runs are asked for, and what the report says of known rewards."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import ROOT
from tests.test_study_report import report, rows_of
from tests.test_study_runs import run


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "when")
    import reward_grid  # pyright: ignore[reportMissingImports]

    yield reward_grid
    sys.modules.pop("reward_grid")


GAINS = {"lora": 0.4, "dora": 0.5, "direction": 0.4, "magnitude": 0.2, "full": 0.39}


def line(job: Any) -> dict[str, Any]:
    """A run whose middle rate is the best, and whose prompts differ in difficulty."""
    draw = np.random.default_rng(job.seed)
    rewards = GAINS[job.method] + draw.uniform(0, 0.2, 64)
    known = {} if job.seed == 100 else {"rewards": rewards.tolist()}
    return {
        **vars(job),
        "trainable": 10,
        "untrained_reward": 0.2,
        "valid_reward": 1 - abs(np.log(job.rate / MIDDLE[job.method])),
        **known,
    }


MIDDLE = {"lora": 3e-4, "dora": 3e-4, "direction": 3e-4, "magnitude": 4.8e-3}
MIDDLE["full"] = 1e-5


def study(grid: Any, most: int = 100) -> dict[Any, Any]:
    done: dict[Any, Any] = {}
    for number, job in enumerate(grid.jobs(done)):
        if number == most:
            break
        assert job not in done
        done[job] = line(job)
    return done


def test_five_seeds_run_at_the_chosen_rate(grid: Any) -> None:
    done = study(grid)
    assert len(done) == 5 * (3 + 5)
    for job in done:
        assert job.seed == 100 or job.rate == MIDDLE[job.method]
    assert list(grid.jobs(done)) == []
    # The most important runs come first, and an interrupted study goes on with them.
    begun = [*done][: 3 * 3 + 3 * 5]
    assert {job.method for job in begun} == {*grid.FIRST}
    assert next(grid.jobs({job: done[job] for job in begun})).method == "magnitude"


def test_rewards_get_the_known_verdicts(grid: Any, tmp_path: Path) -> None:
    text = report(tmp_path, [], [*study(grid).values()])["H8"]
    means, verdicts = text.split("| against LoRA", 1)
    lora = next(row for row in rows_of(means) if row[0] == "lora")
    assert lora[2:4] == ["0.0003", "0.200"]
    assert lora[4].startswith("0.50")
    assert lora[5] == "5 of 5"
    shown = {row[0]: (row[2], row[3]) for row in rows_of("| x" + verdicts)}
    assert shown["dora"] == ("+0.100 (+0.100 to +0.100)", "better")
    assert shown["magnitude"] == ("-0.200 (-0.200 to -0.200)", "worse")
    assert shown["full"][1] == shown["direction"][1] == "alike"


def test_rewards_are_shown_while_runs_are_missing(grid: Any, tmp_path: Path) -> None:
    text = report(tmp_path, [], [*study(grid, 3 * 3 + 3 * 2).values()])["H8"]
    assert "No run yet at the chosen rate: magnitude, full." in text
    means, _ = text.split("| against LoRA", 1)
    assert [row[5] for row in rows_of(means)] == ["2 of 5"] * 3


RUNS = """
import sys
sys.path.insert(0, "when")
import _harness
import mlx.core as mx
from pathlib import Path
mx.disable_compile()
import reward
from reward_grid import METHODS, Job

reward.BLOCKS, reward.PROMPTS = 2, {"train": 20, "valid": 3, "test": 5}
bench = reward.Bench(Path(MODEL), updates=2)
runs = [bench.run(Job(method, rates[-1], 1)) for method, rates in METHODS.items()]
again = bench.run(Job("dora", METHODS["dora"][-1], 1))
facts = ("digest", "curve", "rewards", "valid_reward", "trainable")
assert all(again[fact] == runs[1][fact] for fact in facts)
assert "rewards" not in bench.run(Job("lora", 1e-3, 100))
assert len({line["digest"] for line in runs}) == 5
lora, dora, direction, magnitude, full = (line["trainable"] for line in runs)
assert direction == lora < dora == lora + magnitude < full
for line in runs:
    assert len(line["curve"]) == 2 and line["skipped_steps"] == 0
    assert len(line["rewards"]) == 5
    assert {*line["rewards"]} <= {0, 0.5, 1}
"""


def test_a_run_of_each_method_repeats_to_the_bit(
    make_tiny_folder: Callable[..., Path],
) -> None:
    script = RUNS.replace("MODEL", repr(str(make_tiny_folder())))
    run(script)
