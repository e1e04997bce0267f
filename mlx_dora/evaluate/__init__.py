"""Evaluates a model: loss, label accuracy, samples, fused against unfused."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.evaluate.comparison import Comparison, compare_models
    from mlx_dora.evaluate.config import EvaluateConfig
    from mlx_dora.evaluate.fused import verify_fused
    from mlx_dora.evaluate.labels import label_accuracy
    from mlx_dora.evaluate.loss import LossResult, evaluate_loss, loss_fn

_HOME = {
    "Comparison": "mlx_dora.evaluate.comparison",
    "EvaluateConfig": "mlx_dora.evaluate.config",
    "LossResult": "mlx_dora.evaluate.loss",
    "compare_models": "mlx_dora.evaluate.comparison",
    "evaluate_loss": "mlx_dora.evaluate.loss",
    "label_accuracy": "mlx_dora.evaluate.labels",
    "loss_fn": "mlx_dora.evaluate.loss",
    "verify_fused": "mlx_dora.evaluate.fused",
}

__all__ = [
    "Comparison",
    "EvaluateConfig",
    "LossResult",
    "compare_models",
    "evaluate_loss",
    "label_accuracy",
    "loss_fn",
    "verify_fused",
]

__getattr__, __dir__ = public_names(__name__, _HOME)
