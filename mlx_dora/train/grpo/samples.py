"""The log of sampled completions and their rewards, ``samples.jsonl``."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_dora.train.grpo.generation import Generation
from mlx_dora.train.rewards import Reward

SAMPLES_NAME = "samples.jsonl"


def sample_rows(
    generation: Generation,
    rewards: Sequence[Reward],
    totals: np.ndarray,
    advantages: np.ndarray | None,
    facts: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A row of the log for each completion.

    Args:
        generation: The completions.
        rewards: The reward functions.
        totals: Weighted sum of each completion's rewards.
        advantages: Advantage of each completion; None in a validation.
        facts: What is the same for all, such as the step.
    """
    rows = []
    for at, completion in enumerate(generation.completions):
        values = generation.rewards[at].tolist()
        row = {
            **facts,
            "prompt": generation.shown[at],
            "completion": generation.texts[at],
            "tokens": len(completion.tokens),
            "stopped": completion.is_stopped,
            "rewards": {
                reward.name: None if math.isnan(value) else value
                for reward, value in zip(rewards, values, strict=True)
            },
            "reward": None if math.isnan(totals[at]) else float(totals[at]),
        }
        if advantages is not None:
            row["advantage"] = float(advantages[at])
        rows.append(row)
    return rows
