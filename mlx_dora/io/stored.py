"""A tensor that stays in its file and is read slice by slice."""

import math
import os
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.header import TensorInfo
from mlx_dora.io.sliced import SlicedTensor

DTYPES: dict[str, tuple[str, mx.Dtype]] = {
    "BOOL": ("?", mx.bool_),
    "U8": ("<u1", mx.uint8),
    "I8": ("<i1", mx.int8),
    "U16": ("<u2", mx.uint16),
    "I16": ("<i2", mx.int16),
    "F16": ("<f2", mx.float16),
    "BF16": ("<u2", mx.bfloat16),
    "U32": ("<u4", mx.uint32),
    "I32": ("<i4", mx.int32),
    "F32": ("<f4", mx.float32),
    "U64": ("<u8", mx.uint64),
    "I64": ("<i8", mx.int64),
    "F64": ("<f8", mx.float64),
}
"""Dtypes that `StoredTensor` reads: NumPy's, with the same bits, and MLX's."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes accepted for weights; F64 is rounded to float32."""

_COMPARED = 1 << 21  # bytes compared at a time


class _Owner:
    """Keeps a file open for as long as this object exists."""


class StoredTensor(SlicedTensor):
    """A tensor in its file; indexing reads a slice along the first axis.

    Offers the part of `mx.array` that block-wise code needs: ``shape``, ``ndim``,
    ``size``, ``reshape`` and slices.

    Args:
        path: A safetensors file whose header was checked.
        info: The tensor's header entry; its dtype is in `DTYPES`.
        name: Name of the tensor in error messages.

    Raises:
        OSError: If the file cannot be opened.
    """

    def __init__(self, path: Path, info: TensorInfo, name: str = "it") -> None:
        self.shape = info.shape
        self._name = name
        self._path, self._info = path, info
        self._file = os.open(path, os.O_RDONLY)
        self._owner = _Owner()  # shared with the results of `reshape`
        weakref.finalize(self._owner, os.close, self._file)

    def __getitem__(self, index: slice) -> mx.array:
        """Read consecutive entries of the first axis.

        Raises:
            DoRAError: If the file is now shorter than its header says, or a float64
                value is too large for float32.
        """
        first, end, step = index.indices(self.shape[0])
        assert step == 1
        kind, dtype = DTYPES[self._info.dtype]
        block = np.empty((max(end - first, 0), *self.shape[1:]), kind)
        width = block.itemsize * math.prod(self.shape[1:])
        self._read(block.reshape(-1).view(np.uint8).data, first * width)
        if self._info.dtype == "F64":
            return mx.array(_rounded(block, f"{self._path}: {self._name}"))
        return mx.array(block).view(dtype)

    def every(self, step: int, count: int) -> bytes:
        """Return every `step`-th element as stored, at most `count` of them."""
        width = self._info.nbytes // max(self.size, 1)
        places = range(0, self.size, step)[:count]
        values = bytearray(width * len(places))
        view = memoryview(values)
        for i, place in enumerate(places):
            self._read(view[i * width : (i + 1) * width], place * width)
        return bytes(values)

    def holds_same_bytes(self, other: "StoredTensor") -> bool:
        """Whether two tensors of one size are equal, byte by byte."""
        size = self._info.nbytes
        if size != other._info.nbytes:
            return False
        buffers = [np.empty(min(size, _COMPARED), np.uint8) for _ in range(2)]
        for start in range(0, size, _COMPARED):
            own, theirs = (buffer[: size - start] for buffer in buffers)
            self._read(own.data, start)
            other._read(theirs.data, start)
            if not np.array_equal(own, theirs):
                return False
        return True

    def _read(self, into: memoryview, start: int) -> None:
        """Fill a buffer from the tensor's bytes at `start`."""
        place, rest = self._info.start + start, into
        while rest.nbytes:
            got = os.preadv(self._file, [rest], place)
            if not got:
                raise DoRAError(f"{self._path} became shorter while it was read.")
            place, rest = place + got, rest[got:]

    def whole(self) -> mx.array:
        """Read the whole tensor."""
        return self.reshape(-1)[:].reshape(self.shape)


def _rounded(values: np.ndarray, name: str) -> np.ndarray:
    """Return a float32 copy of float64 values.

    Raises:
        DoRAError: If a finite value is too large for float32.
    """
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    if np.isinf(single).any() and not np.array_equal(
        np.isinf(single), np.isinf(values)
    ):
        raise DoRAError(f"{name} holds float64 values too large for float32.")
    return single
