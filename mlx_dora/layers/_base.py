"""What a DoRA layer does with the module it wraps: its weight and its linear map."""

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.matrix.packed import unpacks
from mlx_dora.matrix.weight import Weight, as_packed, weight_from

_PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


def weight_of(base: nn.Module) -> Weight:
    """The weight of a base module, dense or packed; of experts or heads, a stack.

    Raises:
        DoRAError: If it is packed with a global scale.
    """
    return weight_from(base, base)


def project(base: nn.Module, x: mx.array) -> mx.array:
    """The base's linear map with its bias, in the dtype of `x`.

    The base's own op, so that an untrained adapter changes no bit, except where a
    packed weight is slow on the CPU (`QuantizedWeight.matmul`).
    """
    packed = as_packed(weight_of(base)) if isinstance(base, _PACKED) else None
    if packed is not None and unpacks(x, packed.shape):
        y = packed.matmul(x)
        y = y + base["bias"] if "bias" in base else y
    elif isinstance(base, nn.Embedding | nn.QuantizedEmbedding):
        y = base.as_linear(x)
    else:
        y = base(x)
    return y if y.dtype == x.dtype else y.astype(x.dtype)


def bias_offset(base: nn.Module, gain: mx.array) -> mx.array | None:
    """(1 − g)·b: W0x + b holds b already, and g∘ takes g∘b of it. None without bias."""
    return (1 - gain) * base["bias"].astype(mx.float32) if "bias" in base else None
