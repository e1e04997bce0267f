"""Checkpoints of a training: folders that are complete or absent.

``<adapter>/checkpoints/<step>/`` holds the trained weights, the optimizer's state and
``state.json``, which names the SHA-256 of both files: a damaged one is noticed.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import atomic_directory, write_tensors, write_text
from mlx_dora.io.gate import read_tensors
from mlx_dora.io.json import read_object
from mlx_dora.train.run.state import TrainState, parse_state

logger = logging.getLogger(__name__)

FOLDER_NAME = "checkpoints"
STATE_NAME = "state.json"
WEIGHTS_NAME = "adapters.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
_VERSION = 1
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
"""The names of checkpoint folders; `str.isdigit` takes ``²`` too."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that has been read and found whole.

    Args:
        path: Its folder.
        state: Where the training stood.
        weights: The trained tensors by name.
        optimizer: The optimizer's state, flattened, by name.
    """

    path: Path
    state: TrainState
    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]


def write_checkpoint(
    folder: Path,
    state: TrainState,
    weights: Mapping[str, mx.array],
    optimizer: Mapping[str, mx.array],
    *,
    keep: int,
) -> None:
    """Write ``<folder>/checkpoints/<step>/``, then delete all but the last `keep`.

    Raises:
        OSError: If the disk is full or not to be written to; the checkpoints that were
            there stay.
    """
    target = folder / FOLDER_NAME / str(state.step)
    with atomic_directory(target, inputs=(), overwrite=True) as work:
        digests = {}
        for name, tensors in ((WEIGHTS_NAME, weights), (OPTIMIZER_NAME, optimizer)):
            write_tensors(work / name, tensors)
            digests[name] = _digest(work / name)
        content = {"version": _VERSION, **asdict(state), "sha256": digests}
        write_text(work / STATE_NAME, json.dumps(content, indent=1) + "\n")
    for path in _folders(folder)[keep:]:
        if path != target:
            shutil.rmtree(path)


def has_checkpoints(folder: Path) -> bool:
    """Whether a folder holds any checkpoint, whole or not."""
    return bool(_folders(folder))


def newest_checkpoint(folder: Path, *, multiple_of: int) -> Checkpoint | None:
    """Read the newest whole checkpoint; a damaged one is named and passed over.

    Args:
        folder: The adapter's folder.
        multiple_of: Pass over those whose step is none of this: there an update was
            made of fewer batches because the run ended, which a longer one does not do.
    """
    for path in _folders(folder):
        try:
            found = _read(path)
        except (OSError, DoRAError) as error:
            logger.warning("checkpoint %s is damaged (%s); passed over", path, error)
            continue
        if found.state.step % multiple_of == 0:
            return found
        logger.info("checkpoint %s ends inside an update; passed over", path)
    return None


def discard_checkpoints(folder: Path) -> None:
    """Delete all checkpoints: another training begins in the folder."""
    for path in _folders(folder):
        shutil.rmtree(path)


def discard_fragments(folder: Path) -> None:
    """Delete what a process that was killed while writing has left behind."""
    place = folder / FOLDER_NAME
    for path in place.glob(".*") if place.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
    for path in folder.glob(".*.partial*"):
        path.unlink()


def _folders(folder: Path) -> list[Path]:
    place = folder / FOLDER_NAME
    paths = place.iterdir() if place.is_dir() else ()
    found = [path for path in paths if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def _read(path: Path) -> Checkpoint:
    content = read_object(path / STATE_NAME)
    if content.get("version") != _VERSION:
        raise DoRAError(
            f"{STATE_NAME} is of version {content.get('version')!r:.20}; this mlx_dora "
            f"reads version {_VERSION}"
        )
    digests = content.get("sha256")
    if not isinstance(digests, dict):
        raise DoRAError(f"{STATE_NAME} names no sha256 of its files")
    tensors = {}
    for name in (WEIGHTS_NAME, OPTIMIZER_NAME):
        if _digest(path / name) != digests.get(name):
            raise DoRAError(f"{name} is not the file that was written")
        # The optimizer's counts of steps are integers.
        tensors[name] = read_tensors(path / name)
    for name, value in tensors[WEIGHTS_NAME].items():
        if not mx.all(mx.isfinite(value)):
            raise DoRAError(f"{name} in {WEIGHTS_NAME} holds NaN or inf")
    return Checkpoint(
        path=path,
        state=parse_state(content, int(path.name)),
        weights=tensors[WEIGHTS_NAME],
        optimizer=tensors[OPTIMIZER_NAME],
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
