"""Which files of a model folder hold its weights: one rule for every command."""

import functools
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_dora.errors import DoRAError
from mlx_dora.io.json import read_object

INDEX_NAME = "model.safetensors.index.json"

logger = logging.getLogger(__name__)


def weight_map(index: Path) -> dict[str, str]:
    """Read an index: tensor names to the files that hold them.

    Raises:
        DoRAError: If it is not such an index, or lists nothing.
    """
    listing = read_object(index).get("weight_map")
    if not isinstance(listing, dict) or not all(
        isinstance(shard, str) for shard in listing.values()
    ):
        raise DoRAError(f"{index} has no weight_map from tensors to files.")
    if not listing:
        raise DoRAError(f"{index} lists no tensors.")
    return listing


def stray_files(folder: Path) -> list[Path]:
    """Return the ``model*.safetensors`` beside those that the index lists.

    Without an index, or where none of its files is there, there are no strays.

    Raises:
        DoRAError: If the index cannot be read.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        return []
    listed = set(weight_map(index).values())
    files = sorted(folder.glob("model*.safetensors"))
    if not any(path.name in listed for path in files):
        return []
    return [path for path in files if path.name not in listed]


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the model: ``model*.safetensors`` without strays.

    The index says what belongs together. mlx-lm itself reads every file, and what it
    reads last wins; transformers prefers ``model.safetensors``. A warning names the
    strays, once in a process.

    Raises:
        DoRAError: If the index cannot be read.
    """
    strays = stray_files(folder)
    if strays:
        _warn(str(folder), ", ".join(path.name for path in strays))
    return [p for p in sorted(folder.glob("model*.safetensors")) if p not in strays]


@functools.cache
def _warn(folder: str, names: str) -> None:
    logger.warning(
        "%s: not read, since %s does not list it: %s. Delete it; or, if it is the "
        "model, delete the index and the files that the index lists.",
        folder,
        INDEX_NAME,
        names,
    )


@contextmanager
def without_strays(folder: Path) -> Iterator[Path]:
    """Yield a model folder for mlx-lm, which reads every ``model*.safetensors``.

    Where there are strays, it is a temporary folder of links to everything else. Files
    opened in it stay readable afterwards.
    """
    files = weight_files(folder)
    strays = set(folder.glob("model*.safetensors")) - set(files)
    if not strays:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlx_dora-") as place:
        for path in folder.iterdir():
            if path not in strays:
                (Path(place) / path.name).symlink_to(path.resolve())
        yield Path(place)
