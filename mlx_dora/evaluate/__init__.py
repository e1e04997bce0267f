"""Evaluates a model: loss, label accuracy, samples, fused against unfused."""

from mlx_dora.evaluate.comparison import Comparison, compare_models
from mlx_dora.evaluate.config import EvaluateConfig
from mlx_dora.evaluate.fused import verify_fused
from mlx_dora.evaluate.labels import label_accuracy
from mlx_dora.evaluate.loss import LossResult, evaluate_loss, loss_fn

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
