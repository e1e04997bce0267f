"""Rows of training data, each with its origin."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dora.data.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows as read from their source.

    Args:
        values: One mapping per row, as a list or a Hub data set.
        source: Name of the source, for messages.
        config: Names of the features.
        lines: Line number of each row, if the rows come from a file.
    """

    values: Sequence[Any]
    source: str
    config: DataConfig
    lines: Sequence[int] | None = None

    def where(self, index: int) -> str:
        """Name a row, for use in messages."""
        if self.lines is None:
            return f"{self.source}, row {index}"
        return f"{self.source}, line {self.lines[index]}"
