"""The callback through which long work reports how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of the phase, its total number of steps, and the steps newly
done."""
