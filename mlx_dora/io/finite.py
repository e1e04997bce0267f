"""Whether what is about to be written, or was just computed, holds numbers."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError

_BLOCK = 1 << 20  # elements


def is_finite(block: mx.array) -> bool:
    """Whether an array of floats holds neither NaN nor inf. Evaluates it."""
    values = block if block.dtype == mx.float16 else block.astype(mx.float32)
    mx.eval(values)
    seen = np.array(values, copy=False)
    # They go through a sum, which is faster than every flag; a sum that overflows says
    # nothing.
    with np.errstate(over="ignore", invalid="ignore"):
        total = seen.sum()
    return bool(np.isfinite(total)) or bool(np.isfinite(seen).all())


def all_finite(tensor: mx.array) -> bool:
    """`is_finite` of a tensor of any size or dtype, a block of it at a time."""
    if not mx.issubdtype(tensor.dtype, mx.floating):
        return True
    mx.eval(tensor)
    flat = tensor.reshape(-1)
    starts = range(0, flat.size, _BLOCK)
    return all(is_finite(flat[first : first + _BLOCK]) for first in starts)


def refuse_not_finite(tensors: Mapping[str, mx.array], what: str) -> None:
    """Refuse tensors that hold NaN or inf.

    Args:
        tensors: Name to tensor, of any dtype.
        what: What the message calls the whole, such as "the merged adapter".

    Raises:
        DoRAError: Naming the first such tensor and how many more there are.
    """
    names = [name for name, tensor in tensors.items() if not all_finite(tensor)]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise DoRAError(f"{what}: {names[0]}{more} holds NaN or inf.")
