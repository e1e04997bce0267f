"""Reading data sets from the Hugging Face Hub."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mlx_dora.data.config import DataConfig, hub_entries
from mlx_dora.data.files import NAMES
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError


def _hub() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # optional
    except ImportError:
        raise DoRAError(
            "reading a data set from the Hugging Face Hub needs the package "
            "'datasets': pip install datasets"
        ) from None
    return datasets


def _could_be_on_hub(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(p and p not in (".", "..", "~") for p in parts)


def read_hub(config: DataConfig, names: Sequence[str]) -> dict[str, list[Rows]]:
    """Read the given splits of the Hub data set named by ``data``.

    Raises:
        DoRAError: If there is no such data set, or the Hub cannot be reached.
    """
    name = config.data
    if not _could_be_on_hub(name):
        raise DoRAError(f"data folder or file {name} does not exist.")
    try:
        datasets = _hub()
    except DoRAError as error:
        raise DoRAError(
            f"there is no folder or file {name}, and it cannot be read from the Hub: "
            f"{error}"
        ) from None
    try:
        loaded = datasets.load_dataset(name)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DoRAError(
            f"there is no folder or file {name}, and no such data set could be loaded "
            f"from the Hub: {_one_line(error)}"
        ) from error
    splits: dict[str, list[Rows]] = {}
    for split in names:
        found = next((alias for alias in NAMES[split] if alias in loaded), None)
        source = f"{name} ({found})"
        splits[split] = (
            []
            if found is None
            else [Rows(values=loaded[found], source=source, config=config)]
        )
    return splits


def read_hub_entries(config: DataConfig, names: Sequence[str]) -> dict[str, list[Rows]]:
    """Read the given splits of all ``hf_dataset`` entries, concatenated.

    Raises:
        DoRAError: If an entry cannot be read.
    """
    datasets = _hub()
    defaults = {"train": "train[:80%]", "valid": "train[-10%:]", "test": None}
    splits: dict[str, list[Rows]] = {name: [] for name in names}
    features = ("prompt_feature", "completion_feature", "chat_feature", "text_feature")
    for entry in hub_entries(config.hf_dataset):
        named = {key: entry[key] for key in features if key in entry}
        reading = dataclasses.replace(config, **named)
        for name in names:
            split = entry.get(f"{name}_split", defaults[name])
            if split is None:
                continue
            extra = entry.get("config") or {}
            try:
                loaded = datasets.load_dataset(entry["path"], split=split, **extra)
            except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
                raise DoRAError(
                    f"hf_dataset {entry['path']} ({split}): {_one_line(error)}"
                ) from error
            source = f"{entry['path']} ({split})"
            splits[name].append(Rows(values=loaded, source=source, config=reading))
    return splits


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
