"""What a DoRA layer knows of the module it wraps: its weight and its linear map."""

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.kernels import QuantizedWeight
from mlx_dora.kernels.quantized import unpacks
from mlx_dora.kernels.rows import Weight

Packed = nn.QuantizedLinear | nn.QuantizedEmbedding


def packed_weight(base: Packed) -> QuantizedWeight:
    """The weight of a quantised module as one value."""
    return QuantizedWeight(
        weight=base["weight"],
        scales=base["scales"],
        biases=base.get("biases"),
        group_size=base.group_size,
        bits=base.bits,
        mode=base.mode,
    )


def packed_shape(base: Packed) -> tuple[int, int]:
    """Shape ``(out, in)`` of the weight that a quantised module stands for."""
    out, words = base["weight"].shape
    return out, words * 32 // base.bits


def weight_of(base: nn.Module) -> Weight:
    """The weight of a base module, dense or packed."""
    return packed_weight(base) if isinstance(base, Packed) else base["weight"]


def project(base: nn.Module, x: mx.array) -> mx.array:
    """The base's linear map with its bias, in the dtype of `x`.

    The base's own op, so that an untrained adapter changes no bit, except where a
    packed weight is slow on the CPU (`QuantizedWeight.matmul`).
    """
    if isinstance(base, Packed) and unpacks(x, packed_shape(base)):
        y = packed_weight(base).matmul(x)
        y = y + base["bias"] if "bias" in base else y
    elif isinstance(base, nn.Embedding | nn.QuantizedEmbedding):
        y = base.as_linear(x)
    else:
        y = base(x)
    return y if y.dtype == x.dtype else y.astype(x.dtype)
