"""Killed and resumed runs of every objective, compared with uninterrupted runs."""

from pathlib import Path
from typing import Any

import pytest

from tests.train.killed import PLAIN, assert_same_run
from tests.train.saved import log

CASES: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo", "preference": {"best_metric": "accuracy"}},
    "precomputed": {"objective": "dpo", "preference": {"precompute_reference": True}},
    "full": {"objective": "dpo", "fine_tune_type": "full"},
    "lora": {"objective": "dpo", "fine_tune_type": "lora"},
    "recomputed": {"objective": "dpo", "grad_checkpoint": True},
    "orpo": {"objective": "orpo"},
    "kto": {"objective": "kto"},
    "kto full": {"objective": "kto", "fine_tune_type": "full"},
    "simpo": {"objective": "simpo"},
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("dpo", "kto") else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_a_kill_changes_nothing(name: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"dropout": 0.0, **CASES[name]}
    PLAIN.finish(whole, **settings)
    PLAIN.kill_at_step(killed, 5, 0.02, **settings)
    errors = PLAIN.finish(killed, **settings, resume=True)
    assert_same_run(whole, killed)
    assert (killed / "checkpoints").is_dir(), errors
    metrics = log(whole)[-1]["metrics"]
    assert set(metrics) >= {"rewards/chosen", "logps/rejected"}
    # The table that a killed run left is used again, bit for bit.
    tables = [folder / "reference.safetensors" for folder in (whole, killed)]
    assert [table.exists() for table in tables] == [name == "precomputed"] * 2
    if name == "precomputed":
        assert tables[0].read_bytes() == tables[1].read_bytes()
