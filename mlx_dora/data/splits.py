"""The named parts of a data set: train, valid and test."""

from collections.abc import Sequence
from pathlib import Path

from mlx_dora.data.config import DataConfig
from mlx_dora.data.hub import read_hub, read_hub_entries
from mlx_dora.data.jsonl import read_jsonl
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError

SPLITS = ("train", "valid", "test")


def read_splits(
    config: DataConfig, names: Sequence[str] = SPLITS
) -> dict[str, list[Rows]]:
    """Read the named splits of a data set; a split that does not exist has no rows.

    Raises:
        DoRAError: If the data set is not there, or one of its files is malformed.
    """
    if config.hf_dataset is not None:
        return read_hub_entries(config, names)
    folder = Path(config.data).expanduser()
    if folder.is_dir():
        paths = {name: folder / f"{name}.jsonl" for name in names}
        found = {name: path for name, path in paths.items() if path.exists()}
        if not found:
            wanted = ", ".join(path.name for path in paths.values())
            raise DoRAError(f"{folder} has none of {wanted}.")
        return {
            name: [read_jsonl(found[name], config)] if name in found else []
            for name in names
        }
    if folder.exists():
        raise DoRAError(
            f"{folder} is a file; data must be a folder with train.jsonl, valid.jsonl "
            "or test.jsonl."
        )
    return read_hub(config, names)
