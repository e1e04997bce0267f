"""Checkpoints of a training: folders that are either complete or absent.

``<adapter>/checkpoints/<step>/`` holds the trained weights, the optimizer's state and
``state.json``, which records the SHA-256 of both files so that damage is detected.
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
"""Pattern of checkpoint folder names; `str.isdigit` would also accept ``²``."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that has been read and verified.

    Args:
        path: Folder of the checkpoint.
        state: State of the training, without arrays.
        weights: Trained tensors by name.
        optimizer: Arrays of the optimizer's state by name.
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
        OSError: If the disk is full or not writable; existing checkpoints stay.
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
    """Whether a folder holds any checkpoint, valid or not."""
    return bool(_folders(folder))


def newest_checkpoint(folder: Path, *, multiple_of: int) -> Checkpoint | None:
    """Read the newest valid checkpoint; skip damaged checkpoints with a warning.

    Args:
        folder: The adapter's folder.
        multiple_of: Skip checkpoints whose step is not a multiple of this. Their last
            update used fewer batches because the run ended; a longer run would not
            make such an update.
    """
    for path in _folders(folder):
        try:
            checkpoint = _read(path)
        except (OSError, DoRAError) as error:
            logger.warning("checkpoint %s is damaged (%s); skipped", path, error)
            continue
        if checkpoint.state.step % multiple_of == 0:
            return checkpoint
        logger.info("checkpoint %s ends inside an update; skipped", path)
    return None


def discard_checkpoints(folder: Path) -> None:
    """Delete all checkpoints, before a new training begins in the folder."""
    for path in _folders(folder):
        shutil.rmtree(path)


def discard_fragments(folder: Path) -> None:
    """Delete partial files left by a process that was killed while writing."""
    place = folder / FOLDER_NAME
    for path in place.glob(".*") if place.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
    for path in folder.glob(".*.partial*"):
        path.unlink()


def _folders(folder: Path) -> list[Path]:
    place = folder / FOLDER_NAME
    paths = place.iterdir() if place.is_dir() else ()
    folders = [path for path in paths if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name), reverse=True)


def _read(path: Path) -> Checkpoint:
    content = read_object(path / STATE_NAME)
    if content.get("version") != _VERSION:
        raise DoRAError(
            f"{STATE_NAME} has version {content.get('version')!r:.20}; this mlx_dora "
            f"reads version {_VERSION}"
        )
    digests = content.get("sha256")
    if not isinstance(digests, dict):
        raise DoRAError(f"{STATE_NAME} has no sha256 of its files")
    tensors = {}
    for name in (WEIGHTS_NAME, OPTIMIZER_NAME):
        if _digest(path / name) != digests.get(name):
            raise DoRAError(f"{name} has changed since it was written")
        # Any dtype: the optimizer's step counts are integers.
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
