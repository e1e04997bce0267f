"""Which adapter each row of the running batch uses."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx

from mlx_dora.errors import DoRAError

BASE = 0
"""The key of rows that use no adapter."""

_PLANS, _MIXES = 64, 2


class Mix:
    """A set of adapters whose factors the layers have joined side by side.

    Attributes:
        keys: Keys of the adapters, in the order of their columns.
        joined: The joined arrays of each layer, made on first use.
    """

    def __init__(self, keys: Iterable[int]) -> None:
        self.keys = tuple(keys)
        self.joined: dict[Hashable, Any] = {}


class Plan:
    """The adapters of one batch, and what the layers derive from them.

    Attributes:
        keys: The adapter's key of each row; `BASE` for none.
        mix: The adapters that the batch uses, and perhaps a few more.
        derived: Arrays that layers made for this batch.
    """

    def __init__(self, keys: tuple[int, ...], mix: Mix) -> None:
        self.keys = keys
        self.mix = mix
        self.derived: dict[Hashable, Any] = {}

    @cached_property
    def groups(self) -> list[tuple[int, mx.array]]:
        """The row indices of each key, in order of the key."""
        return [
            (key, mx.array([i for i, k in enumerate(self.keys) if k == key]))
            for key in sorted(set(self.keys))
        ]

    @cached_property
    def inverse(self) -> mx.array:
        """Indices that put rows ordered by group back in order."""
        order = sorted(range(len(self.keys)), key=lambda i: (self.keys[i], i))
        return mx.argsort(mx.array(order))

    def mask(self, widths: tuple[int, ...]) -> mx.array | None:
        """Return which columns of the mix belong to each row's adapter.

        Args:
            widths: Number of columns of each key of the mix.

        Returns:
            Booleans, shape ``(rows, sum(widths))``; None if all of them are true.
        """
        name = ("mask", widths)
        if name not in self.derived:
            each = zip(self.mix.keys, widths, strict=True)
            owners = [key for key, width in each for _ in range(width)]
            same = [[owner == key for owner in owners] for key in self.keys]
            mask = None if all(map(all, same)) else mx.array(same)
            self.derived[name] = mask
        return self.derived[name]


class BatchRows:
    """The adapter of each row of the batch that runs; all gathered layers share it."""

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[int, ...], Plan] = OrderedDict()
        self._mixes: list[Mix] = []
        self.plan = Plan((BASE,), Mix(()))
        self._order: tuple[mx.array, int, int] | None = None

    def use(self, keys: Sequence[int]) -> None:
        """Set the adapter's key of each row for the following calls of the model."""
        names = tuple(keys)
        self._order = None
        if names == self.plan.keys:
            return
        plan = self._plans.pop(names, None) or Plan(names, self._mix(set(names)))
        self._plans[names] = self.plan = plan
        while len(self._plans) > _PLANS:
            self._plans.popitem(last=False)

    def forget(self) -> None:
        """Drop everything derived; call this when an adapter is added or removed."""
        self._plans.clear()
        self._mixes.clear()
        self.plan = Plan((BASE,), Mix(()))

    def _mix(self, keys: set[int]) -> Mix:
        active = keys - {BASE}
        for mix in self._mixes:
            if active <= set(mix.keys) and len(mix.keys) <= 2 * len(active):
                return mix
        mix = Mix(sorted(active))
        self._mixes = [mix, *self._mixes][:_MIXES]
        return mix

    def rows_of(self, tokens: int, path: str) -> int:
        """Return how many tokens each row of the batch has.

        Raises:
            DoRAError: If the layer's input does not hold whole rows.
        """
        rows = len(self.plan.keys)
        if tokens % rows:
            raise DoRAError(
                f"{path}: the model calls it with {tokens} tokens for a batch of "
                f"{rows} rows, so the rows cannot use different adapters; serve this "
                "adapter alone (--adapter-path)."
            )
        return tokens // rows

    def note_order(self, indices: mx.array) -> None:
        """Note the experts ``(..., k)`` that a container may sort its tokens by."""
        chosen = indices.shape[-1]
        self._order = mx.argsort(indices.flatten()), chosen, indices.size // chosen

    def sorted_values(self, values: mx.array, path: str) -> mx.array:
        """Return each row's value for the tokens as the container sorted them.

        Args:
            values: One value a row. Shape ``(rows,)``.
            path: The layer's path, for messages.

        Returns:
            Values, shape ``(tokens · k,)``.
        """
        assert self._order is not None, "the experts' container is not watched"
        order, chosen, tokens = self._order
        return mx.repeat(values, self.rows_of(tokens, path))[order // chosen]
