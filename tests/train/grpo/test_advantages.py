from typing import Any

import numpy as np
import pytest

from mlx_dora.train.grpo.advantages import advantages
from mlx_dora.train.grpo.config import RewardConfig


def config(count: int = 1, **settings: Any) -> RewardConfig:
    names = tuple("abc"[:count])
    return RewardConfig(num_generations=3, reward_funcs=names, **settings)


REWARDS = np.array([[1.0], [0.0], [5.0], [2.0], [2.0], [2.0]])


def test_a_completion_is_compared_with_its_group() -> None:
    found = advantages(REWARDS, config())
    deviation = np.std([1, 0, 5], ddof=1) + 1e-4
    expected = [-1 / deviation, -2 / deviation, 3 / deviation, 0, 0, 0]
    np.testing.assert_allclose(found.advantage, expected, rtol=1e-12)
    np.testing.assert_array_equal(found.reward, REWARDS[:, 0])
    assert found.flat_groups == 0.5


@pytest.mark.parametrize(
    ("scale", "divisor"),
    [("none", 1.0), ("batch", np.std([1, 0, 5, 2, 2, 2], ddof=1) + 1e-4)],
)
def test_scaling_is_a_choice(scale: str, divisor: float) -> None:
    found = advantages(REWARDS, config(scale_rewards=scale))
    expected = np.array([-1, -2, 3, 0, 0, 0]) / divisor
    np.testing.assert_allclose(found.advantage, expected, rtol=1e-12)


def test_rewards_are_weighted_and_summed() -> None:
    two = np.array([[1.0, 2.0], [0.0, 4.0], [1.0, 0.0]])
    found = advantages(two, config(2, reward_weights=(2.0, 0.5), scale_rewards="none"))
    np.testing.assert_allclose(found.reward, [3, 2, 2])
    np.testing.assert_allclose(found.advantage, np.array([2, -1, -1]) / 3)


def test_completions_without_a_reward_teach_nothing() -> None:
    two = np.array([[1.0, np.nan], [3.0, 1.0], [np.nan, np.nan]])
    found = advantages(two, config(2, scale_rewards="none"))
    np.testing.assert_array_equal(found.reward, [1, 4, np.nan])
    np.testing.assert_allclose(found.advantage, [-1.5, 1.5, 0])
    nothing = advantages(np.full((3, 1), np.nan), config())
    np.testing.assert_array_equal(nothing.advantage, [0, 0, 0])


def test_rewards_may_be_scaled_before_they_are_summed() -> None:
    two = np.array([[1.0, 10.0], [0.0, 30.0], [0.0, 20.0]])
    found = advantages(two, config(2, multi_objective_aggregation="normalize_then_sum"))
    parts = (two - two.mean(0)) / (two.std(0, ddof=1) + 1e-4)
    total = parts.sum(1)
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(found.advantage, expected, rtol=1e-12)
