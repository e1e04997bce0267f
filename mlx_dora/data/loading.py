"""Making data sets from a config or from rows."""

import logging
from collections.abc import Sequence
from typing import Any

from mlx_dora.data.config import DataConfig
from mlx_dora.data.dataset import Dataset, JoinedDataset, TokenDataset
from mlx_dora.data.formats import TOKENS
from mlx_dora.data.rows import Rows
from mlx_dora.data.splits import SPLITS, read_splits
from mlx_dora.errors import DoRAError

logger = logging.getLogger(__name__)


def load_datasets(
    config: DataConfig, tokenizer: Any, names: Sequence[str] = SPLITS
) -> dict[str, Dataset | None]:
    """Read and check the named splits of a data set; a missing split is None.

    Raises:
        DoRAError: If the data set does not exist or a row is malformed.
    """
    return make_datasets(read_splits(config, names), tokenizer)


def make_datasets(
    splits: dict[str, list[Rows]], tokenizer: Any
) -> dict[str, Dataset | None]:
    """Check rows from `read_splits` and make data sets from them.

    Raises:
        DoRAError: If a row is malformed.
    """
    loaded: dict[str, Dataset | None] = {}
    readings: dict[str, list[str]] = {}
    for name, parts in splits.items():
        sets = [TokenDataset(rows, tokenizer) for rows in parts]
        loaded[name] = JoinedDataset(sets) if len(sets) > 1 else next(iter(sets), None)
        for dataset in sets[:1]:
            rows = f"{sum(map(len, sets)):,} {name} rows ({dataset.rows.source})"
            readings.setdefault(describe_format(dataset), []).append(rows)
    for reading, rows in readings.items():
        logger.info("Data: %s; %s", ", ".join(rows), reading)
    return loaded


def describe_format(dataset: TokenDataset) -> str:
    """Describe how rows are read: their format, and columns used and not used."""
    format, first = dataset.format, dataset.rows.values[0]
    if format is TOKENS:
        return format.title
    used = format.required(dataset.rows.config)
    used += tuple(name for name in format.optional if name in first)
    rest = [name for name in first if name not in used]
    unused = f", without {', '.join(rest)}" if rest else ""
    return f"{format.title} ({', '.join(used)}{unused})"


def as_dataset(data: Any, tokenizer: Any, config: DataConfig, name: str) -> Dataset:
    """Return a `Dataset` unchanged, or make one from a sequence of rows.

    Raises:
        DoRAError: If a row is malformed, or there are no rows.
    """
    if isinstance(data, TokenDataset | JoinedDataset):
        return data
    if len(data) == 0:
        raise DoRAError(f"{name} is empty.")
    return TokenDataset(Rows(values=data, source=name, config=config), tokenizer)
