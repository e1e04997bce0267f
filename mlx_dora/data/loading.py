"""From a setting or from rows to data sets."""

from collections.abc import Sequence
from typing import Any

from mlx_dora.data.config import DataConfig
from mlx_dora.data.dataset import Dataset, JoinedDataset, TokenDataset
from mlx_dora.data.rows import Rows
from mlx_dora.data.splits import SPLITS, read_splits
from mlx_dora.errors import DoRAError


def load_datasets(
    config: DataConfig, tokenizer: Any, names: Sequence[str] = SPLITS
) -> dict[str, Dataset | None]:
    """Read and check the named splits of a data set; None for one that is not there.

    Raises:
        DoRAError: If the data set does not exist or a row is malformed.
    """
    return make_datasets(read_splits(config, names), tokenizer)


def make_datasets(
    splits: dict[str, list[Rows]], tokenizer: Any
) -> dict[str, Dataset | None]:
    """Check rows that `read_splits` has read, and make data sets of them.

    Raises:
        DoRAError: If a row is malformed.
    """
    loaded: dict[str, Dataset | None] = {}
    for name, parts in splits.items():
        sets = [TokenDataset(rows, tokenizer) for rows in parts]
        loaded[name] = JoinedDataset(sets) if len(sets) > 1 else next(iter(sets), None)
    return loaded


def as_dataset(data: Any, tokenizer: Any, config: DataConfig, name: str) -> Dataset:
    """Take a data set of ours, or any sequence of rows, as a data set.

    Raises:
        DoRAError: If a row is malformed or there is none.
    """
    if isinstance(data, TokenDataset | JoinedDataset):
        return data
    if len(data) == 0:
        raise DoRAError(f"{name} is empty.")
    return TokenDataset(Rows(values=data, source=name, config=config), tokenizer)
