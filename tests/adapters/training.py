"""Replaces training in tests of adapters."""

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.surgery import adapter_layers, apply_layers

TOKENS = mx.array([[1, 5, 9, 200, 7, 31]])
QV = ("self_attn.q_proj", "self_attn.v_proj")


def perturb(model: nn.Module, size: float = 0.02) -> None:
    """Give every adapter a nonzero update, as if trained."""
    mx.random.seed(7)
    for _, layer in adapter_layers(model):
        layer.lora_b = size * mx.random.normal(layer.lora_b.shape)
        if "m" in layer:
            layer.m = layer.m * (1 + 0.05 * mx.random.normal(layer.m.shape))


def train(
    model: nn.Module, config: DoRAConfig | None = None, kind: str = "dora"
) -> mx.array:
    """Adapt a model and return its output for `TOKENS` in eval mode."""
    model.eval()
    mx.random.seed(3)
    apply_layers(model, config or DoRAConfig(num_layers=2, keys=QV), kind)  # pyright: ignore[reportArgumentType]
    perturb(model)
    logits = model(TOKENS)
    mx.eval(logits)
    return logits
