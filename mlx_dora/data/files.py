"""Reading the files of a data set: JSON, CSV and Parquet."""

import logging
from collections.abc import Callable
from pathlib import Path

from mlx_dora.data.config import DataConfig
from mlx_dora.data.json_rows import read_json_rows
from mlx_dora.data.rows import Rows
from mlx_dora.data.tables import read_csv, read_parquet
from mlx_dora.errors import DoRAError

logger = logging.getLogger(__name__)

READERS: dict[str, Callable[[Path, DataConfig], Rows]] = {
    ".jsonl": read_json_rows,
    ".json": read_json_rows,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".tsv": read_csv,
}
"""The reader for each ending, in order of precedence."""

NAMES = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}
"""The names under which each split is looked for."""


def read_file(path: Path, config: DataConfig) -> Rows:
    """Read a file of rows.

    Raises:
        DoRAError: If the ending is unknown or the content is malformed.
    """
    if path.suffix.lower() not in READERS:
        raise DoRAError(
            f"{path}: unknown kind of file; data are read from files that end in "
            f"{', '.join(READERS)}."
        )
    return READERS[path.suffix.lower()](path, config)


def find_files(folder: Path) -> dict[str, list[Path]]:
    """Find the files of each split in a folder, or in its subfolder ``data``.

    A split is a file such as ``train.csv``, or shards such as
    ``train-00000-of-00002.parquet``. A file with any other name is the training data if
    it is the only one.

    Raises:
        DoRAError: If the folder holds no data, or several files with other names.
    """
    for place in (folder, folder / "data"):
        found = {split: _find_split(place, split) for split in NAMES}
        if any(found.values()):
            return found
    kinds = ", ".join(f"*{ending}" for ending in READERS)
    others = sorted(p for p in folder.iterdir() if p.suffix.lower() in READERS)
    if len(others) == 1:
        return {"train": others, "valid": [], "test": []}
    expected = f"expected train.jsonl, or another of {kinds} named train"
    if not others:
        raise DoRAError(f"{folder} holds no data: {expected}.")
    names = ", ".join(path.name for path in others)
    raise DoRAError(
        f"{folder} holds {names}: {expected} (and optionally valid and test); or give "
        "one of the files as the data."
    )


def _find_split(folder: Path, split: str) -> list[Path]:
    """The files of a split; of several kinds, those of the first."""
    kinds = []
    for name in NAMES[split]:
        for ending in READERS:
            single = folder / f"{name}{ending}"
            shards = sorted(folder.glob(f"{name}-*-of-*{ending}"))
            kinds += [[single]] * single.is_file() + [shards] * bool(shards)
    if len(kinds) > 1:
        others = ", ".join(path.name for kind in kinds[1:] for path in kind)
        logger.warning("%s is read; %s beside it is not", kinds[0][0], others)
    return kinds[0] if kinds else []
