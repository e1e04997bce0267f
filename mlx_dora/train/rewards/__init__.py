"""Rewards of completions: shipped functions, and the user's by dotted name."""

from mlx_dora.train.rewards.call import Reward, check_columns, load_rewards, score
from mlx_dora.train.rewards.shipped import (
    SHIPPED,
    exact_match,
    number_match,
    regex_match,
    valid_json,
)

__all__ = [
    "SHIPPED",
    "Reward",
    "check_columns",
    "exact_match",
    "load_rewards",
    "number_match",
    "regex_match",
    "score",
    "valid_json",
]
