"""Type of the callback that reports the progress of long work."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of the phase, its total number of steps, and the number of steps
completed since the last call."""
