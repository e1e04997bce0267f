"""Fine-tuning: `finetune`, its settings and reports, and the memory it will need."""

from mlx_dora.train.config import TrainConfig
from mlx_dora.train.plan.predict import plan_memory
from mlx_dora.train.run.finetune import finetune
from mlx_dora.train.run.journal import StepReport, TrainReport

__all__ = ["StepReport", "TrainConfig", "TrainReport", "finetune", "plan_memory"]
