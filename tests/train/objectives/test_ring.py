"""Objectives of preferences on two processes, compared with one."""

from pathlib import Path
from typing import Any

import pytest

from tests.checks import assert_close, to_numpy
from tests.train import ring
from tests.train.killed import PLAIN
from tests.train.saved import log, tensors

CASES: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo", "preference": {"precompute_reference": True}},
    "kto": {"objective": "kto", "preference": {"loss_type": ["apo_zero_unpaired"]}},
    "simpo": {"objective": "simpo", "preference": {"cpo_alpha": 0.0}},
}


@pytest.mark.parametrize(
    "name",
    [n if n == "dpo" else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
def test_two_processes_train_like_one(name: str, tmp_path: Path) -> None:
    settings = {"dropout": 0.0, "iters": 8, **CASES[name]}
    both, alone = tmp_path / "both", tmp_path / "alone"
    command = PLAIN.words(both, **settings)
    for code, errors in ring.both(tmp_path, command, command):
        assert code == 0, errors
    PLAIN.finish(alone, **settings)
    ours, theirs = log(both), log(alone)
    assert len(ours) == len(theirs)
    for line, expected in zip(ours, theirs, strict=True):
        assert line["trained_tokens"] == expected["trained_tokens"]
        for key in {"train_loss", "val_loss"} & line.keys():
            assert line[key] == pytest.approx(expected[key], rel=1e-3)
        for key, value in line["metrics"].items():
            if key != "rewards/accuracies":  # of rewards near 0, rounding decides
                assert value == pytest.approx(
                    expected["metrics"][key], rel=1e-3, abs=1e-4
                ), key
    weights = tensors(alone)
    for key, value in tensors(both).items():
        # Adam's first steps amplify the rounding of gradients near 0.
        assert_close(value, to_numpy(weights[key]), bound=2e-3)


@pytest.mark.slow
def test_the_divergence_of_kto_is_shared(tmp_path: Path) -> None:
    # Desirable rows alone raise every answer, mismatched ones too: z is not cut at 0.
    settings = {
        **{"dropout": 0.0, "iters": 8, "objective": "kto"},
        "preference": {"undesirable_weight": 0.0},
    }
    command = PLAIN.words(tmp_path / "both", **settings)
    for code, errors in ring.both(tmp_path, command, command):
        assert code == 0, errors
    lines = [line for line in log(tmp_path / "both") if "train_loss" in line]
    assert lines
    assert all(line["metrics"]["kl"] >= 0 for line in lines)
    assert any(line["metrics"]["kl"] > 0 for line in lines)
