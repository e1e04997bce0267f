"""A tensor whose rows are gathered from another one, read slice by slice."""

import math

import mlx.core as mx
import numpy as np

from mlx_dora.io.sliced import SlicedTensor
from mlx_dora.io.stored import StoredTensor


class GatheredTensor(SlicedTensor):
    """Rows of a source tensor in another order, with new rows in between.

    Offers what block-wise code needs: ``shape``, ``ndim``, ``size``, ``reshape`` and
    slices, which are float32. Consecutive rows of the source are read at once.

    Args:
        source: The tensor, shape ``(rows, ...)``.
        rows: For each row of the result, a row of the source, or −1 − j for row j of
            `extra`.
        extra: The new rows, shape ``(k, ...)``, float32.
    """

    def __init__(
        self,
        source: "mx.array | StoredTensor | GatheredTensor",
        rows: np.ndarray,
        extra: np.ndarray,
    ) -> None:
        self._source, self._rows, self._extra = source, rows, extra
        self._width = math.prod(source.shape[1:])
        self.shape = (len(rows), *source.shape[1:])

    def __getitem__(self, index: slice) -> mx.array:
        """Read consecutive entries of the first axis, float32."""
        first, end, step = index.indices(self.shape[0])
        assert step == 1
        inner = math.prod(self.shape[1:])
        start, stop = first * inner, max(end, first) * inner
        low = start // self._width
        high = -(-stop // self._width)
        flat = self._read(low, high).reshape(-1)
        skip = low * self._width
        part = flat[start - skip : stop - skip]
        return mx.array(part).reshape(-1, *self.shape[1:])

    def _read(self, low: int, high: int) -> np.ndarray:
        """Rows `low` to `high` of the result, shape ``(rows, width)``."""
        rows = self._rows[low:high]
        out = np.empty((len(rows), self._width), np.float32)
        breaks = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] <= 0)) + 1
        for start, stop in zip([0, *breaks], [*breaks, len(rows)], strict=True):
            if start == stop:
                continue
            row, count = int(rows[start]), stop - start
            if row < 0:
                out[start:stop] = self._extra[-1 - row].reshape(1, -1)
            else:
                block = self._source[row : row + count].astype(mx.float32)
                out[start:stop] = np.array(block).reshape(count, -1)
        return out
