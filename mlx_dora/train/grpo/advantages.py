"""Advantages of completions within their groups, in float64 NumPy."""

from dataclasses import dataclass

import numpy as np

from mlx_dora.train.grpo.config import RewardConfig

_EPSILON = 1e-4  # TRL's


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """Rewards of a generation, and the advantages computed from them.

    Args:
        reward: Weighted sum of each completion's rewards, NaN if no function gave a
            reward. Shape ``(groups * completions,)``.
        advantage: Advantage of each completion; 0 without a reward.
        deviation: Standard deviation of all rewards; 0 if there are fewer than 2.
        flat_groups: Share of the groups whose completions have equal rewards, from
            which nothing is learned.
    """

    reward: np.ndarray
    advantage: np.ndarray
    deviation: float
    flat_groups: float


def advantages(rewards: np.ndarray, config: RewardConfig) -> Advantages:
    r"""Compare each completion's reward with its group's.

    .. math:: A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r) + 10^{-4}}

    (GRPO, arXiv:2402.03300, section 4.1.2; the standard deviation has n - 1 in its
    denominator, as in TRL.) ``scale_rewards`` chooses the group's deviation, that of
    all completions, or none; ``multi_objective_aggregation`` the order of scaling and
    summing (``normalize_then_sum`` is GDPO's).

    Args:
        rewards: A column for each function, NaN where it gave no reward; the
            completions of a group in consecutive rows. Shape
            ``(groups * num_generations, functions)``.
        config: The weights and the choices.
    """
    rewards = np.asarray(rewards, np.float64)
    size, weights = config.num_generations, np.array(config.weights)
    total = total_rewards(rewards, config)
    unscored = np.isnan(total)
    groups = total.reshape(-1, size)
    spread = _deviation(groups, axis=1)
    if config.multi_objective_aggregation == "normalize_then_sum":
        parts = rewards.reshape(-1, size, rewards.shape[1])
        parts = (parts - _mean(parts, axis=1)) / (_deviation(parts, axis=1) + _EPSILON)
        scaled = np.nansum(parts.reshape(rewards.shape) * weights, axis=1)
        scaled = np.where(unscored, np.nan, scaled)
        relative = scaled - _mean(scaled, axis=0)
        relative = relative / (_deviation(scaled, axis=0) + _EPSILON)
    else:
        relative = groups - _mean(groups, axis=1)
        if config.scale_rewards == "group":
            relative = relative / (spread + _EPSILON)
        elif config.scale_rewards == "batch":
            relative = relative / (_deviation(total, axis=0) + _EPSILON)
    return Advantages(
        reward=total,
        deviation=float(np.nan_to_num(_deviation(total, axis=0)[0])),
        advantage=np.nan_to_num(relative.reshape(-1), nan=0.0),
        flat_groups=float(np.isclose(spread, 0).mean()),
    )


def total_rewards(rewards: np.ndarray, config: RewardConfig) -> np.ndarray:
    """Weighted sum of each completion's rewards; NaN if no function gave one.

    Args:
        rewards: As in `advantages`.
        config: The weights.
    """
    unscored = np.isnan(rewards).all(axis=1)
    total = np.nansum(rewards * np.array(config.weights), axis=1)
    return np.where(unscored, np.nan, total)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the numbers along an axis of length 1 then; NaN where there are none."""
    count = (~np.isnan(values)).sum(axis=axis, keepdims=True)
    total = np.nansum(values, axis=axis, keepdims=True)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _deviation(values: np.ndarray, axis: int) -> np.ndarray:
    """Sample standard deviation, as `_mean`; NaN where there are fewer than 2."""
    spare = (~np.isnan(values)).sum(axis=axis, keepdims=True) - 1
    squares = (values - _mean(values, axis)) ** 2
    total = np.nansum(squares, axis=axis, keepdims=True)
    empty = np.full(total.shape, np.nan)
    return np.sqrt(np.divide(total, spare, out=empty, where=spare > 0))
