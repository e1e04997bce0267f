"""A DoRA layer as a plain module again."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from mlx_dora.kernels.fusing import dense_fused, packed_fused
from mlx_dora.layers._base import weight_of
from mlx_dora.matrix.low_rank import Adapted
from mlx_dora.matrix.weight import Weight, as_packed, dense_dtype, matrices, stacked


def fused_module(
    base: nn.Module,
    adapted: Sequence[Adapted],
    dense_type: type[nn.Module],
    dequantize: bool,
) -> Any:
    """A module like `base` with the adapter in its weight.

    Args:
        base: The frozen module.
        adapted: The adapter of each matrix of its weight.
        dense_type: Class of a module like `base` with a dense weight.
        dequantize: Return a dense module for a packed base too.

    Returns:
        A module of the base's class (dense if `dequantize`) in the base's dtype. Rows
        that the adapter leaves as they were keep their packed values.
    """
    weight = weight_of(base)
    fused: list[Weight] = []
    for one, adapter in zip(matrices(weight), adapted, strict=True):
        packed = as_packed(one)
        if packed is None or dequantize:
            fused.append(dense_fused(one, adapter, dense_dtype(one)))
        else:
            fused.append(packed_fused(packed, adapter, **packed.form))
    after = fused[0] if len(weight.shape) == 2 else stacked(fused)
    packed = as_packed(after)
    settings: dict[str, object] = {}
    parts: dict[str, object] = {"weight": after}
    kind = type(base) if packed or not as_packed(weight) else dense_type
    if packed is not None:
        parts = {**packed.parts, "biases": packed.biases}
        # group_size, bits, mode and an embedding's sizes: plain attributes.
        settings = {k: v for k, v in vars(base).items() if not k.startswith("_")}
    if "bias" in base:
        parts["bias"] = base["bias"]
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in (settings | parts).items():
        setattr(module, name, value)
    return module
