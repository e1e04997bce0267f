"""Makes the objective that the settings name."""

from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import Loss, loss_fn
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.objectives.dpo import Dpo
from mlx_dora.train.objectives.grpo import Grpo
from mlx_dora.train.objectives.kto import Kto
from mlx_dora.train.objectives.objective import Objective
from mlx_dora.train.objectives.orpo import Orpo
from mlx_dora.train.objectives.preference import Preference
from mlx_dora.train.objectives.sft import Sft
from mlx_dora.train.objectives.simpo import Simpo

PREFERENCES: dict[str, type[Preference]] = {
    objective.name: objective for objective in (Dpo, Orpo, Kto, Simpo)
}


def make_objective(
    train: TrainConfig,
    preference: PreferenceConfig | None = None,
    loss: Loss = loss_fn,
    reward: RewardConfig | None = None,
) -> Objective:
    """Make the objective that ``train.objective`` names.

    Args:
        train: Settings of the training.
        preference: Settings of dpo, orpo, kto and simpo; default: TRL's defaults.
        loss: Loss of sft.
        reward: Settings of grpo; default: TRL's defaults.

    Raises:
        DoRAError: If settings are given that the objective does not read.
    """
    if train.objective != Grpo.name and reward not in (None, RewardConfig()):
        raise DoRAError(
            f"settings of grpo do not apply to objective {train.objective}: set "
            "objective to grpo, or leave them out."
        )
    if make := PREFERENCES.get(train.objective):
        return make(preference or PreferenceConfig(), train.max_seq_length)
    if preference is not None and preference != PreferenceConfig():
        raise DoRAError(
            f"settings of preferences do not apply to objective {train.objective}: set "
            f"objective to {', '.join(PREFERENCES)}, or leave them out."
        )
    if train.objective == Grpo.name:
        return Grpo(reward or RewardConfig())
    return Sft(loss)
