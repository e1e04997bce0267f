"""The names that requests may use, and the adapters behind them."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_dora.errors import DoRAError
from mlx_dora.layers.gathered import BASE
from mlx_dora.serve.paths import DEFAULT, NotServedError


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a request may choose: the base, or a loaded adapter.

    Attributes:
        name: Name of the adapter; empty for the base.
        key: Key of its rows, which no later adapter has, not even of the same name.
        folder: The adapter's folder; None for the base.
    """

    name: str = ""
    key: int = BASE
    folder: Path | None = None


class Registry:
    """The served adapters by name; usable from several threads.

    Args:
        base_names: Names of the base model; the first is the one to list.
    """

    def __init__(self, base_names: Sequence[str]) -> None:
        self.base_names = tuple(base_names)
        self._served: dict[str, Served] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were loaded."""
        with self._lock:
            return list(self._served)

    def find(self, name: str) -> Served | None:
        """Return a loaded adapter by name, or None."""
        with self._lock:
            return self._served.get(name)

    def put(self, served: Served) -> Served | None:
        """Add an adapter, and return the one it replaces."""
        with self._lock:
            before = self._served.get(served.name)
            self._served[served.name] = served
            return before

    def pop(self, name: str) -> Served | None:
        """Remove an adapter, and return it."""
        with self._lock:
            return self._served.pop(name, None)

    def choose(self, model: str, adapters: str | None) -> Served:
        """Return what a request asks for.

        Args:
            model: ``model`` of the request: an adapter or the base.
            adapters: ``adapters`` of the request: an adapter, or None.

        Raises:
            NotServedError: If there is no such adapter or model.
            DoRAError: If the request names two adapters.
        """
        is_base = model == DEFAULT or model in self.base_names
        if not is_base and adapters is not None and adapters != model:
            raise DoRAError(
                f"the request names two adapters, {model!r:.200} as its model and "
                f"{adapters!r:.200} as its adapter; name one."
            )
        name = adapters if is_base else model
        if name is None:
            return Served()
        if (served := self.find(name)) is None:
            known = ", ".join([self.base_names[0], *self.names])
            raise NotServedError(f"{name!r:.200} is not served; served are: {known}.")
        return served
