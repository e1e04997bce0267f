"""Damaged inputs: a few here, thousands by ``.ci/run`` (``python -m tests.fuzz``)."""

import queue
import random
import sys
from pathlib import Path

import pytest

from tests.fuzz import runner
from tests.fuzz.mutate import mutate_file
from tests.fuzz.runner import fuzz, rows

COUNT = 40


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_no_damaged_input_ends_in_anything_but_one_line(state: Path) -> None:
    found = fuzz(state, range(COUNT), seed=0, workers=1)
    assert found.tried == COUNT
    assert 0 < found.taken < COUNT  # the harness reaches both ends
    assert found.faults == [], "\n".join(found.lines())


def test_a_run_that_was_stopped_goes_on(state: Path) -> None:
    fuzz(state, range(COUNT), seed=0, workers=1)
    before = len(list(rows(state)))
    found = fuzz(state, range(COUNT + 2), seed=0, workers=1)
    assert found.tried == COUNT + 2
    assert len(list(rows(state))) == before + 2


def test_another_seed_is_not_mixed_in(state: Path) -> None:
    fuzz(state, range(1), seed=0, workers=1)
    with pytest.raises(ValueError, match="is of seed 0, not 1"):
        fuzz(state, range(1), seed=1, workers=1)


WORKER = """
import json, os, sys
log = open(sys.argv[1], "a")
for number in map(int, sys.stdin):
    log.write(json.dumps({"begun": number, "kind": "x", "what": "y"}) + "\\n")
    log.flush()
    if number == 2:
        log.write("{half")
        log.flush()
        os._exit(9)
    while number == 4:
        pass
    log.write(json.dumps({"case": number, "outcome": "taken"}) + "\\n")
    log.flush()
"""


def test_a_case_that_crashes_or_never_ends_is_a_fault_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MAX_SECONDS", 0.3)
    (tmp_path / "worker.py").write_text(WORKER)
    worker = runner.Worker(0, tmp_path, seed=0)
    worker.command = [sys.executable, str(tmp_path / "worker.py"), str(worker.log)]
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(7):
        numbers.put(number)
    worker.run(numbers)
    outcomes = {row["case"]: row for row in rows(tmp_path)}
    assert sorted(outcomes) == list(range(7))
    faults = {n: row["detail"] for n, row in outcomes.items() if "detail" in row}
    assert sorted(faults) == [2, 4]
    assert faults[2].startswith("the process ended with code 9")
    assert faults[4].startswith("it took more than 0 s")


def test_damage_comes_from_the_seed_alone(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        path = tmp_path / "a.json"
        path.write_text('{"a": [1, 2, {"b": "c"}], "d": null}')
        dice = random.Random("0/1")
        made.append([(mutate_file(path, dice), path.read_bytes()) for _ in range(9)])
    assert made[0] == made[1]
