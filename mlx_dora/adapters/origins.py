"""Where the parameters of a lazily loaded model lie in its files.

A lazy array is read whole, even for a few of its values. What needs few values, or
only compares bytes, reads them from the file instead.
"""

import io
import weakref
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.io.header import TensorInfo
from mlx_dora.io.stored import StoredTensor

_NAME = "_mlx_dora_origins"


class Origins:
    """The file, and the header's entry, of each parameter that a model took unchanged.

    Args:
        infos: Header entries of the model's files, by tensor name.
    """

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = infos
        self._of: dict[int, tuple[weakref.ref[mx.array], Path, str]] = {}

    def add(self, path: str | Path, tensors: Mapping[str, mx.array]) -> None:
        """Note the lazy arrays of a file, which are not kept alive."""
        place = Path(
            path
        ).resolve()  # what is opened later must not be a temporary link
        for name, array in tensors.items():
            self._of[id(array)] = weakref.ref(array), place, name

    def stored(self, array: mx.array) -> StoredTensor | None:
        """Return the stored tensor of an array that was neither read nor changed."""
        if (origin := self._of.get(id(array))) is None or origin[0]() is not array:
            return None
        # Some models change arrays in place, which keeps their identity.
        if not _is_only_load(array):
            return None
        _, path, name = origin
        return StoredTensor(path, self._infos[name], name)

    def keep(self, model: nn.Module) -> None:
        """Remember the origins of a model's parameters with the model."""
        alive = {id(array) for _, array in tree_flatten(model.parameters())}
        self._of = {key: self._of[key] for key in alive & self._of.keys()}
        setattr(model, _NAME, self)


def origins_of(model: nn.Module) -> Origins:
    """Return the origins of a model's parameters; empty unless it was loaded lazily."""
    return getattr(model, _NAME, None) or Origins({})


def _is_only_load(array: mx.array) -> bool:
    """Whether nothing is to be computed for an array but reading it."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return graph.getvalue().count("label =") == 1 and 'label ="Load"' in (
        graph.getvalue()
    )
