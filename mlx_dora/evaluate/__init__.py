"""Evaluates a model: loss, label accuracy, samples, fused against unfused."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.evaluate.comparison import Comparison, compare_models
    from mlx_dora.evaluate.config import EvaluateConfig
    from mlx_dora.evaluate.fused import verify_fused
    from mlx_dora.evaluate.labels import label_accuracy
    from mlx_dora.evaluate.loss import LossResult, evaluate_loss, loss_fn
    from mlx_dora.evaluate.tasks import TaskTable, evaluate_tasks

_HOME = {
    "Comparison": "mlx_dora.evaluate.comparison",
    "EvaluateConfig": "mlx_dora.evaluate.config",
    "LossResult": "mlx_dora.evaluate.loss",
    "TaskTable": "mlx_dora.evaluate.tasks",
    "compare_models": "mlx_dora.evaluate.comparison",
    "evaluate_loss": "mlx_dora.evaluate.loss",
    "evaluate_tasks": "mlx_dora.evaluate.tasks",
    "label_accuracy": "mlx_dora.evaluate.labels",
    "loss_fn": "mlx_dora.evaluate.loss",
    "verify_fused": "mlx_dora.evaluate.fused",
}

__all__ = [
    "Comparison",
    "EvaluateConfig",
    "LossResult",
    "TaskTable",
    "compare_models",
    "evaluate_loss",
    "evaluate_tasks",
    "label_accuracy",
    "loss_fn",
    "verify_fused",
]

__getattr__, __dir__ = public_names(__name__, _HOME)
