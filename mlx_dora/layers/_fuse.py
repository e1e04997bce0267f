"""Converts a DoRA layer to a plain module."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.io.finite import all_finite
from mlx_dora.kernels.fusing import dense_fused, packed_fused
from mlx_dora.matrix.low_rank import Adapted
from mlx_dora.matrix.sharded import ShardedWeight
from mlx_dora.matrix.weight import (
    Weight,
    as_packed,
    matrices,
    stacked,
    unpacked_dtype,
    weight_of,
)


def fused_module(
    base: nn.Module,
    adapted: Sequence[Adapted],
    dense_type: type[nn.Module],
    dequantize: bool,
    own: mx.Dtype = mx.bfloat16,
) -> Any:
    """Return a module like `base` with the adapter merged into its weight.

    Args:
        base: The frozen module.
        adapted: The adapter of each matrix in the weight.
        dense_type: Class of a module like `base` with a dense weight.
        dequantize: Return a dense module for a packed base too.
        own: The model's dtype, for a dense module from a base whose packing has no
            float dtype (mxfp4, mxfp8, nvfp4).

    Returns:
        A module of the base's class (dense if `dequantize`) in the base's dtype. Rows
        that the adapter does not change keep their packed values.

    Raises:
        DoRAError: If the adapted weight holds NaN or inf.
    """
    weight = weight_of(base)
    if isinstance(weight, ShardedWeight):
        raise DoRAError(
            "a model whose weights are divided among processes cannot be fused: save "
            "the adapter, and fuse it into the model's files (mlx_dora.fuse)."
        )
    fused: list[Weight] = []
    for matrix, adapter in zip(matrices(weight), adapted, strict=True):
        packed = as_packed(matrix)
        if packed is None or dequantize:
            full = dense_fused(matrix, adapter, unpacked_dtype(matrix, own))
            _refuse_not_finite(full)
            fused.append(full)
        else:
            again = packed_fused(
                packed, adapter, **packed.form, check=_refuse_not_finite
            )
            fused.append(again)
    after = fused[0] if len(weight.shape) == 2 else stacked(fused)
    packed = as_packed(after)
    settings: dict[str, object] = {}
    parts: dict[str, object] = {"weight": after}
    kind = type(base) if packed or not as_packed(weight) else dense_type
    if packed is not None:
        parts = {**packed.parts, "biases": packed.biases}
        # Plain attributes: group_size, bits, mode, and the sizes of an embedding.
        settings = {k: v for k, v in vars(base).items() if not k.startswith("_")}
    if "bias" in base:
        parts["bias"] = base["bias"]
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in (settings | parts).items():
        setattr(module, name, value)
    return module


def _refuse_not_finite(fused: mx.array) -> None:
    if not all_finite(fused):
        raise DoRAError(
            "the adapted weight holds NaN or inf: either the base does, or the "
            f"adapter's values are too large for {str(fused.dtype).rpartition('.')[2]}."
        )
