"""Options that objectives share under one name."""

from dataclasses import replace
from typing import Any

from mlx_dora.train.config import TrainConfig
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.objectives.config import PreferenceConfig

SHARED = ("reward.beta", "reward.loss_type")
"""Fields whose option is that of the field of preferences."""


def shared_settings(
    train: TrainConfig, preference: PreferenceConfig, reward: RewardConfig
) -> tuple[PreferenceConfig, RewardConfig]:
    """Give the options that both classes know to the objective that is trained."""
    if train.objective != "grpo":
        return preference, replace(reward, reference_adapter=None)
    given: dict[str, Any] = {}
    if preference.beta is not None:
        given["beta"] = preference.beta
    if preference.loss_type is not None:
        given["loss_type"] = ",".join(preference.loss_type)
    none = {"beta": None, "loss_type": None, "reference_adapter": None}
    return replace(preference, **none), replace(reward, **given)
