"""A tensor that stays in its file and is read slice by slice."""

import copy
import math
import os
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.gate import rounded
from mlx_dora.io.header import TensorInfo

# NumPy's dtype for each stored dtype, and MLX's view of the bits (None: the same).
_READ_AS: dict[str, tuple[str, mx.Dtype | None]] = {
    "F64": ("<f8", None),
    "F32": ("<f4", None),
    "F16": ("<f2", None),
    "BF16": ("<u2", mx.bfloat16),
}
STREAMED = tuple(_READ_AS)
"""Dtypes that `StoredTensor` reads."""


class _Owner:
    """Keeps a file open for as long as this object exists."""


class StoredTensor:
    """A float tensor in its file; indexing reads a slice along the first axis.

    Offers the part of `mx.array` that block-wise code needs: ``shape``, ``ndim``,
    ``size``, ``reshape`` and slices.

    Args:
        path: A safetensors file whose header was checked.
        info: The tensor's header entry; its dtype is in `STREAMED`.

    Raises:
        OSError: If the file cannot be opened.
    """

    def __init__(self, path: Path, info: TensorInfo) -> None:
        self.shape = info.shape
        self._path, self._info = path, info
        self._file = os.open(path, os.O_RDONLY)
        self._owner = _Owner()  # shared with the results of `reshape`
        weakref.finalize(self._owner, os.close, self._file)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self._info.shape)

    def reshape(self, shape: int | tuple[int, ...]) -> "StoredTensor":
        """Return the tensor with another shape; one size may be -1."""
        sizes = (shape,) if isinstance(shape, int) else shape
        known = math.prod(size for size in sizes if size != -1)
        changed = copy.copy(self)
        changed.shape = tuple(
            self.size // max(known, 1) if size == -1 else size for size in sizes
        )
        assert math.prod(changed.shape) == self.size
        return changed

    def __getitem__(self, index: slice) -> mx.array:
        """Read consecutive entries of the first axis.

        Raises:
            DoRAError: If the file is now shorter than its header says.
        """
        first, end, step = index.indices(self.shape[0])
        assert step == 1
        kind, seen = _READ_AS[self._info.dtype]
        block = np.empty((max(end - first, 0), *self.shape[1:]), kind)
        width = block.itemsize * math.prod(self.shape[1:])
        place = self._info.start + first * width
        rest = block.reshape(-1).view(np.uint8).data
        while rest.nbytes:
            got = os.preadv(self._file, [rest], place)
            if not got:
                raise DoRAError(f"{self._path} became shorter while it was read.")
            place, rest = place + got, rest[got:]
        if self._info.dtype == "F64":
            block = rounded(block, str(self._path))
        array = mx.array(block)
        return array if seen is None else array.view(seen)
