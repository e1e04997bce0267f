"""The shape of a tensor that is read slice by slice."""

import copy
import math
from typing import Self


class SlicedTensor:
    """The part of `mx.array` that needs no values: ``ndim``, ``size`` and ``reshape``.

    A subclass sets ``shape`` and reads slices along the first axis.
    """

    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def reshape(self, shape: int | tuple[int, ...]) -> Self:
        """Return the tensor with another shape; one size may be -1."""
        sizes = (shape,) if isinstance(shape, int) else shape
        known = math.prod(size for size in sizes if size != -1)
        changed = copy.copy(self)
        changed.shape = tuple(
            self.size // max(known, 1) if size == -1 else size for size in sizes
        )
        assert math.prod(changed.shape) == self.size
        return changed
