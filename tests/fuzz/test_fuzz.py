"""Damaged inputs: a few here, thousands by ``.ci/run`` (``python -m tests.fuzz``)."""

import random
from pathlib import Path

import pytest

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


def test_damage_comes_from_the_seed_alone(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        path = tmp_path / "a.json"
        path.write_text('{"a": [1, 2, {"b": "c"}], "d": null}')
        dice = random.Random("0/1")
        made.append([(mutate_file(path, dice), path.read_bytes()) for _ in range(9)])
    assert made[0] == made[1]
