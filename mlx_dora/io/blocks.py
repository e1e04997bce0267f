"""Rows of a tensor read from its file, so that no full matrix is in memory."""

from collections.abc import Iterator

import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.checkpoint import Checkpoint

READABLE = ("F64", "F32", "F16", "BF16")
_BLOCK = 1 << 16  # elements


def read_blocks(checkpoint: Checkpoint, name: str) -> Iterator[np.ndarray]:
    """Yield consecutive row blocks of a float matrix as float32; float64 is kept.

    Raises:
        DoRAError: If the tensor is not a matrix with a dtype in `READABLE`.
    """
    info = checkpoint.info(name)
    if len(info.shape) != 2 or info.dtype not in READABLE:
        raise DoRAError(
            f"{name} of {checkpoint.folder} has shape {info.shape} and dtype "
            f"{info.dtype}; a matrix of {', '.join(READABLE)} was expected."
        )
    rows, width = info.shape
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[info.dtype]
    step = max(1, _BLOCK // max(width, 1))
    with checkpoint.shard(name).open("rb") as file:
        file.seek(info.start)
        for start in range(0, rows, step):
            count = (min(start + step, rows) - start) * width
            block = np.frombuffer(file.read(count * int(kind[-1])), kind)
            if info.dtype == "BF16":  # the upper half of a float32
                block = (block.astype(np.uint32) << 16).view(np.float32)
            elif info.dtype == "F16":
                block = block.astype(np.float32)
            yield block.reshape(-1, width)
