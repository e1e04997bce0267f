"""Adapters of one base that different rows of one batch use."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.nn as nn

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.files import read_adapter
from mlx_dora.adapters.named import NamedAdapters
from mlx_dora.adapters.surgery import put_modules
from mlx_dora.layers import DoRALayer
from mlx_dora.layers.gathered import (
    BASE,
    BatchRows,
    GatheredLayer,
    GatheredSwitchLinear,
    gathered_layer,
    watch_sorting,
)


class GatheredAdapters:
    """DoRA and LoRA adapters of one model, chosen for each row of a batch.

    For example::

        model, tokenizer = load("base")
        adapters = GatheredAdapters(model)
        poet = adapters.add("adapters/poet")
        coder = adapters.add("adapters/coder")
        adapters.use([poet, coder, BASE])
        logits = model(tokens)  # three rows

    Rows of all adapters and of the base share the product with the base's weights. An
    adapter's key is never used again, so results may be cached by key and tokens.

    `add` does all three steps. A server takes them one by one: `check` and `put` where
    the model runs, and `measure`, which reads the base's weights once, in any thread.

    Args:
        model: A model without adapters, in eval mode. Do not add adapters to it by
            other means while this object is in use.

    Raises:
        DoRAError: If the model has adapters already.
    """

    def __init__(self, model: nn.Module) -> None:
        self._named = NamedAdapters(model)
        self._model = model
        self._bases = dict(model.named_modules())
        self._layers: dict[str, GatheredLayer] = {}
        self._rows = BatchRows()
        self._last = BASE

    def add(self, adapter: Adapter | str | Path, *, check_base: bool = True) -> int:
        """Add an adapter.

        Args:
            adapter: An adapter, its folder, or a Hub id.
            check_base: Refuse an adapter that was trained on a different model.

        Returns:
            The adapter's key.

        Raises:
            DoRAError: If the adapter does not fit the model; lists all problems.
        """
        label = "the adapter" if isinstance(adapter, Adapter) else str(adapter)
        if not isinstance(adapter, Adapter):
            adapter = read_adapter(adapter)
        self.check(label, adapter, check_base=check_base)
        return self.put(self.measure(label))

    def check(self, name: str, adapter: Adapter, *, check_base: bool = True) -> None:
        """Check that an adapter fits the model, and keep it for `measure`.

        Raises:
            DoRAError: If it does not fit; lists all problems.
        """
        put_modules(self._model, [(path, self._bases[path]) for path in self._layers])
        try:
            self._named.add(name, adapter, check_base=check_base)
        finally:
            self._show()

    def measure(self, name: str) -> dict[str, DoRALayer]:
        """Return the layers of a checked adapter, by path."""
        try:
            return self._named.layers(name)
        finally:
            self._named.remove(name)

    def put(self, layers: Mapping[str, DoRALayer]) -> int:
        """Add an adapter's layers to the model, and return its key.

        Raises:
            DoRAError: If the model calls one of its experts in an unknown way.
        """
        new = {
            path: gathered_layer(self._bases[path], self._rows, path)
            for path in layers
            if path not in self._layers
        }
        for path, layer in new.items():
            if isinstance(layer, GatheredSwitchLinear):
                watch_sorting(self._bases[path.rpartition(".")[0]], self._rows)
        self._layers |= new
        self._last += 1
        for path, layer in layers.items():
            self._layers[path].put(self._last, layer)
        self._rows.forget()
        self._show()
        return self._last

    def drop(self, key: int) -> None:
        """Remove an adapter; no later batch may use its key."""
        for layer in self._layers.values():
            layer.drop(key)
        self._rows.forget()

    def use(self, keys: Sequence[int]) -> None:
        """Set each row's adapter for the following calls of the model.

        Args:
            keys: A key from `add` for each row of the batch; `BASE` for none.
        """
        self._rows.use(keys)

    def _show(self) -> None:
        put_modules(self._model, list(self._layers.items()))
