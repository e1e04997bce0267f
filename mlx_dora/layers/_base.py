"""What a DoRA layer knows of the module it wraps: weight, shape, matching dense form."""

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.kernels import QuantizedWeight, fused_weight
from mlx_dora.kernels.rows import Weight

Packed = nn.QuantizedLinear | nn.QuantizedEmbedding


def weight_of(base: nn.Module) -> Weight:
    """The weight of a base module, packed weights as one value."""
    if isinstance(base, Packed):
        return QuantizedWeight(
            weight=base["weight"],
            scales=base["scales"],
            biases=base.get("biases"),
            group_size=base.group_size,
            bits=base.bits,
            mode=base.mode,
        )
    return base["weight"]


def project(base: nn.Module, x: mx.array) -> mx.array:
    """The base's linear map with its bias, in the dtype of `x`.

    The base's own op, so that an untrained adapter changes no bit, except where a
    packed weight is slow on the CPU (`QuantizedWeight.matmul`).
    """
    if isinstance(base, Packed):
        y = weight_of(base).matmul(x)
        y = y + base["bias"] if "bias" in base else y
    elif isinstance(base, nn.Embedding):
        y = base.as_linear(x)
    else:
        y = base(x)
    return y.astype(x.dtype)


def fused_module(layer: nn.Module, dequantize: bool) -> nn.Module:
    """The base of a `DoRALayer` with the adapter in its weight.

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
    if not isinstance(weight, QuantizedWeight):
        parts = {"weight": fused}
        module = type(base).__new__(type(base))
    elif dequantize:
        parts = {"weight": fused}
        dense = nn.Linear if isinstance(base, nn.QuantizedLinear) else nn.Embedding
        module = dense.__new__(dense)
    else:
        parts = _packed_again(weight, fused)
        module = type(base).__new__(type(base))
    nn.Module.__init__(module)
    if isinstance(weight, QuantizedWeight) and not dequantize:
        for name in ("group_size", "bits", "mode", "num_embeddings", "dims"):
            if name in base.__dict__:
                setattr(module, name, base.__dict__[name])
    if "bias" in base:
        parts["bias"] = base["bias"]
    for name, value in parts.items():
        setattr(module, name, value)
    return module


def _packed_again(
    weight: QuantizedWeight, fused: mx.array
) -> dict[str, mx.array | None]:
    packed, scales, *biases = mx.quantize(
        fused, group_size=weight.group_size, bits=weight.bits, mode=weight.mode
    )
    changed = (fused != weight.dequantize()).any(axis=1, keepdims=True)
    return {
        "weight": mx.where(changed, packed, weight.weight),
        "scales": mx.where(changed, scales, weight.scales),
        "biases": mx.where(changed, biases[0], weight.biases) if biases else None,
    }
