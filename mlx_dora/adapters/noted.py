"""Notes which tensors of files the arrays of a model are, while mlx-lm loads it."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dora.io.header import TensorInfo, read_header
from mlx_dora.io.stored import StoredTensor


class NotedTensors:
    """Where the arrays that mlx-lm reads come from, by identity.

    An array that mlx-lm passes on to the model unchanged is the tensor in the file, by
    whatever name.
    """

    def __init__(self) -> None:
        # Holds the arrays, so that no other takes their place.
        self._places: dict[int, tuple[mx.array, Path, str]] = {}
        self._headers: dict[Path, dict[str, TensorInfo]] = {}

    def load(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Read a file like `mx.load`."""
        loaded = mx.load(path, *args, **kwargs)
        if isinstance(loaded, dict) and str(path).endswith(".safetensors"):
            file = Path(path).resolve()  # a view of the folder may end before us
            self._headers[file] = read_header(file)
            for name, array in loaded.items():
                self._places[id(array)] = (array, file, name)
        return loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    def stored(self, array: mx.array) -> StoredTensor | None:
        """Return the tensor in a file that an array is; None if it was changed."""
        place = self._places.get(id(array))
        if place is None or place[0] is not array:
            return None
        _, file, name = place
        info = self._headers[file][name]
        if tuple(info.shape) != tuple(array.shape):
            return None
        return StoredTensor(file, info, name)


@contextmanager
def noted_tensors() -> Iterator[NotedTensors]:
    """Note the tensors that mlx-lm reads during the block."""
    utils: Any = importlib.import_module("mlx_lm.utils")
    own, noted = utils.mx, NotedTensors()
    utils.mx = noted
    try:
        yield noted
    finally:
        utils.mx = own
