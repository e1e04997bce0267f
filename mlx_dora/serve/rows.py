"""Carries the adapter of each row through mlx-lm's batch generator."""

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.gathered import GatheredAdapters


class AdapterRows:
    """The adapter's key of each row, in the form of a cache of a model's layer.

    mlx-lm's batch generator merges, extends, filters and extracts the caches of a batch
    whenever its rows change. Standing last in each sequence's list of caches, this
    object therefore always has one key for each row of the batch.

    Attributes:
        keys: The adapter's key of each row.
    """

    nbytes = 0

    def __init__(self, keys: Sequence[int]) -> None:
        self.keys = list(keys)

    @classmethod
    def merge(cls, caches: Sequence["AdapterRows"]) -> Self:
        """Return the rows of several sequences as a batch."""
        return cls([key for cache in caches for key in cache.keys])

    def extend(self, other: "AdapterRows") -> None:
        """Add the rows of another batch."""
        self.keys += other.keys

    def filter(self, keep: Any) -> None:
        """Keep only these rows."""
        self.keys = [self.keys[int(row)] for row in keep]

    def extract(self, row: int) -> "AdapterRows":
        """Return a single row."""
        return AdapterRows([self.keys[row]])

    @property
    def state(self) -> list[mx.array]:
        """Arrays to evaluate: none."""
        return []

    def prepare(self, **_: Any) -> None:
        """Ignore how prompts are padded."""

    def finalize(self) -> None:
        """Ignore the end of padding."""

    def is_trimmable(self) -> bool:
        """Return that tokens may be removed, which changes nothing here."""
        return True

    def trim(self, count: int) -> int:
        """Return `count`, the number of tokens removed."""
        return count

    def size(self) -> int:
        """Return the number of tokens that this cache limits: none."""
        return 0

    def empty(self) -> bool:
        """Return whether it has no rows."""
        return not self.keys


class RoutedModel:
    """A model that applies each row's adapter, which its cache names.

    Args:
        model: A model with gathered layers.
        adapters: Its adapters.
    """

    def __init__(self, model: nn.Module, adapters: GatheredAdapters) -> None:
        self._model: Any = model
        self._adapters = adapters

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Return the logits of the tokens ``(rows, tokens)``."""
        *caches, rows = cache
        assert isinstance(rows, AdapterRows), "the cache names no adapters"
        assert len(rows.keys) == len(tokens), "the cache has other rows than the batch"
        self._adapters.use(rows.keys)
        return self._model(tokens, cache=caches)
