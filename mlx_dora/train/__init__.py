"""Fine-tuning: `finetune`, its settings and reports, and the memory it will need.

The names are loaded on first use, since importing the settings must not import MLX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_dora.train.config import TrainConfig
    from mlx_dora.train.plan.predict import plan_memory
    from mlx_dora.train.run.finetune import finetune
    from mlx_dora.train.run.journal import StepReport, TrainReport

_HOME = {
    "StepReport": "mlx_dora.train.run.journal",
    "TrainConfig": "mlx_dora.train.config",
    "TrainReport": "mlx_dora.train.run.journal",
    "finetune": "mlx_dora.train.run.finetune",
    "plan_memory": "mlx_dora.train.plan.predict",
}

__all__ = ["StepReport", "TrainConfig", "TrainReport", "finetune", "plan_memory"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_dora.train' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
