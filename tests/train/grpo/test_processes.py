"""GRPO on two processes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.train import ring
from tests.train.killed import GRPO, lines
from tests.train.saved import same_bits, tensors


def test_two_processes_share_prompts_and_compare_all_rewards(tmp_path: Path) -> None:
    def run(folder: Path, iters: int) -> None:
        settings = {
            **{"iters": iters, "resume": True, "steps_per_eval": 4},
            "reward": {"scale_rewards": "batch"},
        }
        commands = [  # the second process has no such folder
            GRPO.words(place, **settings) for place in (folder, tmp_path / "elsewhere")
        ]
        ends = ring.both(tmp_path, *commands)
        assert [code for code, _ in ends] == [0, 0], ends

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, 8)
    run(parts, 4)
    run(parts, 8)
    assert same_bits(tensors(whole), tensors(parts))
    assert lines(whole) == lines(parts)
    assert not (tmp_path / "elsewhere").exists()
    texts = [(folder / "samples.jsonl").read_text() for folder in (whole, parts)]
    assert texts[0] == texts[1]
    rows = [json.loads(line) for line in texts[0].splitlines()]
    for step in range(0, 8, 2):
        own = [row for row in rows if row["step"] == step and row["set"] == "train"]
        rewards = np.array([row["reward"] for row in own]).reshape(-1, 3)
        assert len({row["prompt"] for row in own}) in (3, 4)  # 4 prompts an update
        gains = rewards - rewards.mean(1, keepdims=True)
        gains = gains / (rewards.std(ddof=1) + 1e-4)
        found = [row["advantage"] for row in own]
        assert found == pytest.approx(gains.ravel().tolist(), rel=1e-6)


def test_a_reward_that_fails_in_one_process_ends_both(tmp_path: Path) -> None:
    settings = {"reward": {"reward_funcs": ("tests.train.grpo.letters.fails_for_abc",)}}
    command = GRPO.words(tmp_path / "adapter", **settings)
    for code, text in ring.both(tmp_path, command, command):
        assert code == 1
        assert re.search(r"reward \S+ failed: ValueError: no abc, for the prompt", text)
