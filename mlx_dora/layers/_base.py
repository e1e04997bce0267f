"""What a DoRA layer knows of the module it wraps: its weight and its linear map."""

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.kernels import QuantizedWeight
from mlx_dora.kernels.quantized import unpacks
from mlx_dora.kernels.rows import Weight

Packed = nn.QuantizedLinear | nn.QuantizedEmbedding


def packed_weight(base: nn.Module) -> QuantizedWeight:
    """The weight of a quantised module as one value."""
    if base.get("global_scale") is not None:
        raise DoRAError(
            f"{type(base).__name__} has weights with a global scale, which cannot take "
            "DoRA."
        )
    return QuantizedWeight(
        weight=base["weight"],
        scales=base["scales"],
        biases=base.get("biases"),
        group_size=cast(int, base.group_size),
        bits=cast(int, base.bits),
        mode=cast(str, base.mode),
    )


def weight_of(base: nn.Module) -> Weight:
    """The weight of a base module, dense or packed; of experts or heads, a stack.

    Raises:
        DoRAError: If it is packed with a global scale.
    """
    return packed_weight(base) if "scales" in base else base["weight"]


def project(base: nn.Module, x: mx.array) -> mx.array:
    """The base's linear map with its bias, in the dtype of `x`.

    The base's own op, so that an untrained adapter changes no bit, except where a
    packed weight is slow on the CPU (`QuantizedWeight.matmul`).
    """
    if isinstance(base, Packed) and unpacks(x, packed_weight(base).shape):
        y = packed_weight(base).matmul(x)
        y = y + base["bias"] if "bias" in base else y
    elif isinstance(base, nn.Embedding | nn.QuantizedEmbedding):
        y = base.as_linear(x)
    else:
        y = base(x)
    return y if y.dtype == x.dtype else y.astype(x.dtype)
