"""The named parts of a data set: train, valid and test."""

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_dora.data.config import DEFAULT_DATA, DataConfig
from mlx_dora.data.files import find_files, read_file
from mlx_dora.data.hub import read_hub, read_hub_entries
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_SEED = 0  # fixed, so that every command holds out the same rows


def read_splits(
    config: DataConfig, names: Sequence[str] = SPLITS
) -> dict[str, list[Rows]]:
    """Read the named splits of a data set; a split that does not exist has no rows.

    If there is training data but no validation data, some of the training rows become
    the validation data (`DataConfig.valid_share`): the same rows in every call.

    Raises:
        DoRAError: If the data set does not exist, or one of its files is malformed.
    """
    if config.hf_dataset is not None:
        return read_hub_entries(config, names)
    existing, read = _open(config)
    splits = {name: read(name) if name in existing else [] for name in names}
    shares = "train" in existing and {"train", "valid"} & {*names}
    if shares and "valid" not in existing:
        splits |= _hold_out(splits.get("train") or read("train"), config.valid_share)
    return {name: splits[name] for name in names}


def _open(config: DataConfig) -> tuple[set[str], Callable[[str], list[Rows]]]:
    """The names of the splits that exist, and a function that reads one of them."""
    place = Path(config.data).expanduser()
    if place.is_file():
        return {"train"}, lambda name: [read_file(place, config)]
    if place.is_dir():
        files = find_files(place)
        existing = {name for name in SPLITS if files[name]}
        return existing, lambda name: [read_file(path, config) for path in files[name]]
    try:
        splits = read_hub(config, SPLITS)
    except DoRAError as error:
        if config.data != DEFAULT_DATA:
            raise
        raise DoRAError(
            "--data was not given: name a folder, a file or a data set on the Hub. "
            f"(mlx-lm's default, {DEFAULT_DATA}, cannot be used here: {error})"
        ) from None
    if config.data == DEFAULT_DATA:
        logger.warning("--data was not given: using mlx-lm's default, %s", DEFAULT_DATA)
    return {name for name in SPLITS if splits[name]}, splits.__getitem__


def _hold_out(train: list[Rows], share: float) -> dict[str, list[Rows]]:
    total = sum(len(rows.values) for rows in train)
    count = int(total * share)
    if not count:
        return {}
    held = set(random.Random(_SEED).sample(range(total), count))
    split: dict[str, list[Rows]] = {"train": [], "valid": []}
    start = 0
    for rows in train:
        size = len(rows.values)
        for name, is_held in (("train", False), ("valid", True)):
            indices = [i for i in range(size) if (start + i in held) is is_held]
            split[name] += [rows.take(indices)] * bool(indices)
        start += size
    logger.info(
        "There is no validation file: %d of %d training rows, chosen at random but the "
        "same each time, are held out for validation (--valid-share %g; 0 for none)",
        count,
        total,
        share,
    )
    return split
