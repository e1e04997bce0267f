"""Options that objectives share under one name."""

from dataclasses import replace

from mlx_dora.train.config import TrainConfig
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.objectives.config import PreferenceConfig

SHARED = ("reward.beta", "reward.loss_type")
"""Fields whose option is that of the field of preferences."""


def shared_settings(
    train: TrainConfig, preference: PreferenceConfig, reward: RewardConfig
) -> tuple[PreferenceConfig, RewardConfig]:
    """Give ``--beta`` and ``--loss-type`` to the objective that is trained."""
    if train.objective != "grpo":
        return preference, reward
    given = {}
    if preference.beta is not None:
        given["beta"] = preference.beta
    if preference.loss_type is not None:
        given["loss_type"] = ",".join(preference.loss_type)
    return replace(preference, beta=None, loss_type=None), replace(reward, **given)
