"""A DoRA layer as a plain module again."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.io.finite import all_finite
from mlx_dora.kernels import QuantizedWeight, fused_weight
from mlx_dora.kernels.rows import Weight, matrices, stacked
from mlx_dora.layers._base import weight_of
from mlx_dora.layers._layer import DoRALayer


def fused_module(
    layer: DoRALayer, dequantize: bool, own: mx.Dtype | None = None
) -> Any:
    """The base of `layer` with the adapter in its weight.

    Args:
        layer: The DoRA layer.
        dequantize: Return a dense module for a packed base too.
        own: The model's dtype, of a dense module from a base whose packing has none
            (mxfp4, mxfp8, nvfp4); MLX's bfloat16 if None.

    Returns:
        A module of the base's class (dense if `dequantize`) in the base's dtype. Rows
        that the adapter leaves as they were keep their packed values.

    Raises:
        DoRAError: If the adapted weight holds NaN or inf.
    """
    base = layer.base
    weight = weight_of(base)
    fused: list[Weight] = []
    for one, adapted in zip(matrices(weight), layer.matrices(), strict=True):
        update, m = adapted.update, adapted.m
        assert m is not None
        unpacked = one
        if isinstance(one, QuantizedWeight) and dequantize and one.biases is None:
            unpacked = one.dequantize().astype(own or mx.bfloat16)
        dense = fused_weight(unpacked, update.lora_a, update.lora_b, update.scale, m)
        mx.eval(dense)  # one at a time
        if not all_finite(dense):
            raise DoRAError(
                "the adapted weight holds NaN or inf: the base does, or the adapter's "
                f"values are too large for {str(dense.dtype).rpartition('.')[2]}."
            )
        if isinstance(one, QuantizedWeight) and not dequantize:
            fused.append(_packed_again(one, dense))
        else:
            fused.append(dense)
    after = fused[0] if len(weight.shape) == 2 else stacked(fused)
    kind = type(base)
    settings: dict[str, object] = {}
    parts: dict[str, mx.array | None]
    if isinstance(after, QuantizedWeight):
        parts = {n: getattr(after, n) for n in ("weight", "scales", "biases")}
        # group_size, bits, mode and an embedding's sizes: plain attributes.
        settings = {k: v for k, v in vars(base).items() if not k.startswith("_")}
    else:
        parts = {"weight": after}
        if isinstance(weight, QuantizedWeight):
            kind = layer.base_types[0]  # the dense one
    if "bias" in base:
        parts["bias"] = base["bias"]
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in (settings | parts).items():
        setattr(module, name, value)
    return module


def _packed_again(weight: QuantizedWeight, fused: mx.array) -> QuantizedWeight:
    packed, scales, *biases = mx.quantize(
        fused, group_size=weight.group_size, bits=weight.bits, mode=weight.mode
    )
    changed = (fused != weight.dequantize()).any(axis=1, keepdims=True)
    packed = mx.where(changed, packed, weight.weight)
    scales = mx.where(changed, scales, weight.scales)
    before = weight.biases
    bias = None if before is None else mx.where(changed, biases[0], before)
    mx.eval(packed, scales, bias)
    return QuantizedWeight(
        weight=packed,
        scales=scales,
        biases=bias,
        group_size=weight.group_size,
        bits=weight.bits,
        mode=weight.mode,
    )
