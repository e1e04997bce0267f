"""A tensor in its file, of which slices are read."""

import copy
import math
import os
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.gate import rounded
from mlx_dora.io.header import DTYPE_BITS, TensorInfo

# How NumPy reads what is stored, and what MLX then sees in the bits (None: the same).
_READ_AS: dict[str, tuple[str, mx.Dtype | None]] = {
    "F64": ("<f8", None),
    "F32": ("<f4", None),
    "F16": ("<f2", None),
    "BF16": ("<u2", mx.bfloat16),
}
STREAMED = tuple(_READ_AS)
"""The dtypes it takes."""


class _Owner:
    """Keeps a file open as long as it lives."""


class StoredTensor:
    """A float tensor in its file; slices along its first axis are read when asked for.

    Has what work in blocks needs of an `mx.array`: ``shape``, ``ndim``, ``size``,
    ``reshape`` and slices.

    Args:
        path: A safetensors file whose header was checked.
        info: The tensor's entry; its dtype is one of `STREAMED`.

    Raises:
        OSError: If the file cannot be opened.
    """

    def __init__(self, path: Path, info: TensorInfo) -> None:
        self.shape = info.shape
        self._path, self._info = path, info
        self._file = os.open(path, os.O_RDONLY)
        self._owner = _Owner()  # shared with what `reshape` makes
        weakref.finalize(self._owner, os.close, self._file)

    @property
    def ndim(self) -> int:
        """How many axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many elements."""
        return self._info.nbytes * 8 // DTYPE_BITS[self._info.dtype]

    def reshape(self, shape: int | tuple[int, ...]) -> "StoredTensor":
        """The same tensor in another shape; one size may be -1."""
        sizes = (shape,) if isinstance(shape, int) else shape
        known = math.prod(one for one in sizes if one != -1)
        changed = copy.copy(self)
        changed.shape = tuple(
            self.size // max(known, 1) if one == -1 else one for one in sizes
        )
        assert math.prod(changed.shape) == self.size
        return changed

    def __getitem__(self, index: slice) -> mx.array:
        """Read consecutive entries of the first axis.

        Raises:
            DoRAError: If the file has become shorter.
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
