"""A DoRA layer as a plain module again."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.kernels import QuantizedWeight, fused_weight
from mlx_dora.layers._base import weight_of
from mlx_dora.layers._layer import DoRALayer

_DENSE: dict[type, type[nn.Module]] = {
    nn.QuantizedLinear: nn.Linear,
    nn.QuantizedEmbedding: nn.Embedding,
}


def fused_module(layer: DoRALayer, dequantize: bool) -> Any:
    """The base of `layer` with the adapter in its weight.

    Args:
        layer: The DoRA layer.
        dequantize: Return a dense module for a packed base too.

    Returns:
        A module of the base's class (dense if `dequantize`) in the base's dtype. Rows
        that the adapter leaves as they were keep their packed values.
    """
    base = layer.base
    weight = weight_of(base)
    fused = fused_weight(weight, *layer.factors(), layer.scale, layer.m)
    kind = type(base)
    parts: dict[str, mx.array | None] = {"weight": fused}
    settings: dict[str, object] = {}
    if isinstance(weight, QuantizedWeight):
        if dequantize:
            kind = _DENSE[kind]
        else:
            parts = _packed_again(weight, fused)
            # group_size, bits, mode and an embedding's sizes: plain attributes.
            settings = {k: v for k, v in vars(base).items() if not k.startswith("_")}
    if "bias" in base:
        parts["bias"] = base["bias"]
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in (settings | parts).items():
        setattr(module, name, value)
    return module


def _packed_again(
    weight: QuantizedWeight, fused: mx.array
) -> dict[str, mx.array | None]:
    packed, scales, *biases = mx.quantize(
        fused, group_size=weight.group_size, bits=weight.bits, mode=weight.mode
    )
    changed = (fused != weight.dequantize()).any(axis=1, keepdims=True)
    parts: dict[str, mx.array | None] = {
        "weight": mx.where(changed, packed, weight.weight),
        "scales": mx.where(changed, scales, weight.scales),
        "biases": None,
    }
    if weight.biases is not None:
        parts["biases"] = mx.where(changed, biases[0], weight.biases)
    return parts
