"""Fine-tuning: `finetune`, its settings and reports, and its memory plan."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.train.config import TrainConfig
    from mlx_dora.train.grpo.config import RewardConfig
    from mlx_dora.train.objectives.config import PreferenceConfig
    from mlx_dora.train.plan.predict import plan_memory
    from mlx_dora.train.run.finetune import finetune
    from mlx_dora.train.run.journal import StepReport, TrainReport

_HOME = {
    "PreferenceConfig": "mlx_dora.train.objectives.config",
    "RewardConfig": "mlx_dora.train.grpo.config",
    "StepReport": "mlx_dora.train.run.journal",
    "TrainConfig": "mlx_dora.train.config",
    "TrainReport": "mlx_dora.train.run.journal",
    "finetune": "mlx_dora.train.run.finetune",
    "plan_memory": "mlx_dora.train.plan.predict",
}

__all__ = [
    "PreferenceConfig",
    "RewardConfig",
    "StepReport",
    "TrainConfig",
    "TrainReport",
    "finetune",
    "plan_memory",
]

__getattr__, __dir__ = public_names(__name__, _HOME)
