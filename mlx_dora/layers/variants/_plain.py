"""The plain DoRA layer that a variant becomes."""

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.factored import factored_terms
from mlx_dora.layers._base import weight_of
from mlx_dora.layers.linear import DoRALinear


def plain_layer(
    variant: DoRALinear, lora_a: mx.array, lora_b: mx.array, m: mx.array
) -> DoRALinear:
    """A `DoRALinear` over a variant's base, at its scale and in its mode.

    Args:
        variant: The layer to take base, scale and dropout from.
        lora_a: Shape ``(in, r)``.
        lora_b: Shape ``(r, out)``.
        m: Shape ``(out,)``.
    """
    layer = DoRALinear.__new__(DoRALinear)
    nn.Module.__init__(layer)
    layer.linear = variant.linear
    layer.dropout = variant.dropout
    layer.scale = variant.scale
    layer.enabled = variant.enabled
    layer._squared_base = variant["_squared_base"]
    object.__setattr__(layer, "_measured", variant.linear["weight"])
    layer.lora_a, layer.lora_b, layer.m = lora_a, lora_b, m
    mx.eval(lora_a, lora_b, m)
    layer.train(variant.training)
    return layer


def exact_norm(variant: DoRALinear, lora_a: mx.array, lora_b: mx.array) -> mx.array:
    """‖W0 + s·BA‖ of each row in float32, cancelling rows from the dense row.

    The norm that the exported layer divides by in eval mode. Shape ``(out,)``.
    """
    return factored_terms(weight_of(variant.linear), lora_a, lora_b, variant.scale).norm
