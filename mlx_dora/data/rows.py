"""Rows of training data, each with its origin."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dora.data.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows as they were read.

    Args:
        values: One mapping a row; lists and Hub data sets both will do.
        source: What to call them in messages.
        lines: Line numbers of the rows, when they come from a file.
        config: The names of their features.
    """

    values: Sequence[Any]
    source: str
    config: DataConfig
    lines: Sequence[int] | None = None

    def where(self, index: int) -> str:
        """Name one row, for a message."""
        if self.lines is None:
            return f"{self.source}, row {index}"
        return f"{self.source}, line {self.lines[index]}"
