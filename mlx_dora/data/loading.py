"""Making data sets from a config or from rows."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from mlx_dora.data.config import DataConfig
from mlx_dora.data.dataset import JoinedDataset, RowDataset, TokenDataset
from mlx_dora.data.rows import Rows
from mlx_dora.data.splits import SPLITS, read_splits
from mlx_dora.errors import DoRAError

logger = logging.getLogger(__name__)

Make = Callable[[Rows, Any], Any]
"""``(rows, tokenizer) -> data set``: `TokenDataset`, or another `RowDataset`."""


def load_datasets(
    config: DataConfig,
    tokenizer: Any,
    names: Sequence[str] = SPLITS,
    make: Make = TokenDataset,
) -> dict[str, Any]:
    """Read and check the named splits of a data set; a missing split is None.

    Raises:
        DoRAError: If the data set does not exist or a row is malformed.
    """
    return make_datasets(read_splits(config, names), tokenizer, make)


def make_datasets(
    splits: dict[str, list[Rows]], tokenizer: Any, make: Make = TokenDataset
) -> dict[str, Any]:
    """Check rows from `read_splits` and make data sets from them.

    Raises:
        DoRAError: If a row is malformed.
    """
    loaded: dict[str, Any] = {}
    readings: dict[str, list[str]] = {}
    for name, parts in splits.items():
        sets = [make(rows, tokenizer) for rows in parts]
        loaded[name] = JoinedDataset(sets) if len(sets) > 1 else next(iter(sets), None)
        for dataset in sets[:1]:
            count = sum(len(rows.values) for rows in parts)
            rows = f"{count:,} {name} rows ({parts[0].source})"
            readings.setdefault(dataset.reading, []).append(rows)
    for reading, rows in readings.items():
        logger.info("Data: %s; %s", ", ".join(rows), reading)
    return loaded


def as_dataset(
    data: Any,
    tokenizer: Any,
    config: DataConfig,
    name: str,
    make: Make = TokenDataset,
) -> Any:
    """Return a data set unchanged, or make one from a sequence of rows.

    Raises:
        DoRAError: If a row is malformed, or there are no rows.
    """
    if isinstance(data, RowDataset):
        return data
    if len(data) == 0:
        raise DoRAError(f"{name} is empty.")
    return make(Rows(values=data, source=name, config=config), tokenizer)
