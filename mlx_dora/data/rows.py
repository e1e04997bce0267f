"""Rows of training data, each with its origin."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_dora.data.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows as read from their source.

    Args:
        values: One mapping per row, as a list or a Hub data set.
        source: Name of the source, for messages.
        config: Names of the features.
        lines: Number of each row in its file, counted from 1, if it has a file.
        unit: What `lines` counts: ``"line"``, ``"row"`` or ``"entry"``.
    """

    values: Sequence[Any]
    source: str
    config: DataConfig
    lines: Sequence[int] | None = None
    unit: str = "line"

    def take(self, indices: Sequence[int]) -> "Rows":
        """A part of the rows."""
        lines = None if self.lines is None else [self.lines[i] for i in indices]
        return replace(self, values=[self.values[i] for i in indices], lines=lines)

    def where(self, index: int) -> str:
        """Name a row, for use in messages."""
        if self.lines is None:
            return f"{self.source}, row {index}"
        return f"{self.source}, {self.unit} {self.lines[index]}"
