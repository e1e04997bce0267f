"""Checks that arrays hold neither NaN nor infinity."""

import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError

_BLOCK = 1 << 20  # elements


def is_finite(block: mx.array) -> bool:
    """Whether an array of floats holds neither NaN nor inf; evaluates the array."""
    values = block if block.dtype == mx.float16 else block.astype(mx.float32)
    mx.eval(values)
    seen = np.array(values, copy=False)
    # Any NaN or inf makes the sum not finite, and a sum is faster than `isfinite` of
    # every element. An overflowing sum decides nothing.
    with np.errstate(over="ignore", invalid="ignore"):
        total = seen.sum()
    return bool(np.isfinite(total)) or bool(np.isfinite(seen).all())


def all_finite(tensor: mx.array) -> bool:
    """Whether a tensor of any size or dtype is finite; evaluates it block by block."""
    if not mx.issubdtype(tensor.dtype, mx.floating):
        return True
    mx.eval(tensor)
    flat = tensor.reshape(-1)
    starts = range(0, flat.size, _BLOCK)
    return all(is_finite(flat[first : first + _BLOCK]) for first in starts)


def not_finite(tensors: Mapping[str, mx.array]) -> list[str]:
    """Names of the tensors that hold NaN or inf; evaluates all of them."""
    floats = {
        name: tensor
        for name, tensor in tensors.items()
        if mx.issubdtype(tensor.dtype, mx.floating)
    }
    # As in `is_finite`: only a sum that is not finite needs a look at every element.
    sums = {
        name: (
            tensor if tensor.dtype == mx.float64 else tensor.astype(mx.float32)
        ).sum()
        for name, tensor in floats.items()
    }
    mx.eval(sums)
    suspects = [name for name, total in sums.items() if not math.isfinite(float(total))]
    return [name for name in suspects if not mx.isfinite(floats[name]).all()]


def refuse_not_finite(tensors: Mapping[str, mx.array], what: str) -> None:
    """Refuse tensors that hold NaN or inf.

    Args:
        tensors: The tensors by name, of any dtype.
        what: Name of the whole for the message, for example "the merged adapter".

    Raises:
        DoRAError: If a tensor holds NaN or inf; names the first and counts the others.
    """
    if names := not_finite(tensors):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise DoRAError(f"{what}: {names[0]}{more} holds NaN or inf.")
