"""Writes a safetensors file front to back while its tensors are being computed.

The header comes first in the file but is known last. Space is reserved for it, and the
rest of that space is filled with blanks, as the format allows.
"""

import json
import math
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx

from mlx_dora.io.stored import DTYPES

# The header and the eight bytes of its length together fill whole pages.
HEADER_ROOM = (1 << 18) - 8
# Largest number of bytes in memory that wait to be written.
_WAITING = 1 << 25
# Bytes between two flushes, which run during writing so that the last one is short.
_FLUSH = 1 << 26

_NAMES = {dtype: name for name, (_, dtype) in DTYPES.items()}


class TensorStream:
    """Writes one safetensors file; two threads write and flush its blocks.

    Args:
        path: The file to create.
        room: Bytes reserved for the header.
    """

    def __init__(self, path: Path, room: int = HEADER_ROOM) -> None:
        self.path = path
        self._file = path.open("xb", buffering=0)
        self._room = room
        self._entries: dict[str, dict[str, object]] = {
            "__metadata__": {"format": "mlx"}
        }
        self._header_bytes = len(self._header())
        self._expected = self._reached = self._unflushed = 0
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="TensorStream")
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._waiting_bytes = 0

    @property
    def names(self) -> set[str]:
        """Names of the tensors begun so far."""
        return self._entries.keys() - {"__metadata__"}

    @property
    def nbytes(self) -> int:
        """Size in bytes of the tensors begun so far."""
        return self._expected

    def has_room(self, name: str, dtype: mx.Dtype, shape: tuple[int, ...]) -> bool:
        """Whether the header has space for one more tensor."""
        entry = self._entry(name, dtype, shape)
        return self._header_bytes + _length({name: entry}) <= self._room

    def begin(self, name: str, dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
        """Start the next tensor; the previous tensor must be complete."""
        self._check_whole()
        entry = self._entry(name, dtype, shape)
        self._header_bytes += _length({name: entry})
        self._entries[name] = entry
        self._expected += nbytes_of(dtype, shape)

    def write(self, block: mx.array) -> None:
        """Write the next elements of the tensor, in its dtype and any shape.

        Raises:
            OSError: If this or an earlier block could not be written.
        """
        if not block.size:
            return
        data = memoryview(block.reshape(-1).view(mx.uint8))  # pyright: ignore[reportArgumentType] - it has the buffer protocol
        place = 8 + self._room + self._reached
        self._reached += data.nbytes
        if self._reached > self._expected:
            raise RuntimeError(f"{self.path}: more was written than was announced")
        while self._waiting and self._waiting_bytes + data.nbytes > _WAITING:
            self._wait_for_one()
        self._submit(data.nbytes, self._threads.submit(self._write, data, place))
        self._unflushed += data.nbytes
        if self._unflushed >= _FLUSH:
            self._submit(0, self._threads.submit(os.fsync, self._file.fileno()))
            self._unflushed = 0

    def close(self) -> None:
        """Write the header and flush the file.

        Raises:
            OSError: If any data could not be written.
        """
        self._check_whole()
        while self._waiting:
            self._wait_for_one()
        self._threads.shutdown()
        text = self._header().ljust(self._room)
        self._write(memoryview(self._room.to_bytes(8, "little") + text), 0)
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Stop writing and delete the file."""
        self._threads.shutdown(cancel_futures=True)
        self._waiting.clear()
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _entry(
        self, name: str, dtype: mx.Dtype, shape: tuple[int, ...]
    ) -> dict[str, object]:
        end = self._expected + nbytes_of(dtype, shape)
        return {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [self._expected, end],
        }

    def _check_whole(self) -> None:
        if self._reached != self._expected:
            raise RuntimeError(f"{self.path}: a tensor was begun but not written")

    def _header(self) -> bytes:
        return json.dumps(self._entries, separators=(",", ":")).encode()

    def _submit(self, size: int, future: Future[None]) -> None:
        self._waiting.append((size, future))
        self._waiting_bytes += size

    def _wait_for_one(self) -> None:
        size, future = self._waiting.popleft()
        future.result()
        self._waiting_bytes -= size

    def _write(self, data: memoryview, place: int) -> None:
        done = 0
        try:
            while done < data.nbytes:
                done += os.pwrite(self._file.fileno(), data[done:], place + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def nbytes_of(dtype: mx.Dtype, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor in a file, in bytes."""
    return math.prod(shape) * dtype.size


def _length(entry: dict[str, dict[str, object]]) -> int:
    # The braces count two bytes, but in the header the entry adds only a comma.
    return len(json.dumps(entry, separators=(",", ":")).encode()) - 1
