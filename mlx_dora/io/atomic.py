"""All-or-nothing writes: to a temporary path, flushed to disk, then renamed."""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dora.io.aside import (
    NEW_NAME,
    aside_of,
    holding,
    put_in_place,
    remove_leftovers,
)
from mlx_dora.io.header import read_header
from mlx_dora.io.output import Inputs, check_output

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_OS_ERROR = re.compile(r"\(os error (\d+)\)$")

_WRITE_FAILED = "[write]"
"""How MLX's error starts when the system did not write all bytes."""


@contextlib.contextmanager
def atomic_directory(
    path: str | Path, *, inputs: Inputs, overwrite: bool = False, job: str | None = None
) -> Iterator[Path]:
    """Write a folder that appears complete or not at all.

    Yields a new temporary folder. When the block succeeds, its content is flushed to
    disk and the folder is renamed to `path`. When the block raises, the folder is
    deleted and `path` is unchanged. A killed process leaves at most a hidden
    ``.<name>.*.partial`` folder, which the next call with the same `path` removes. If
    the process was killed while replacing an old folder, that call restores the folder.

    Args:
        path: The folder to create. Missing parents are created.
        inputs: All files and folders that are read; see `check_output`.
        overwrite: Replace an existing `path`. The old folder is moved before the rename
            and deleted last.
        job: Text that contains everything that determines the output. With it, a killed
            or interrupted process leaves its folder, and the next call with the same
            `path` and `job` yields that folder with its content.

    Raises:
        DoRAError: If `path` must not be written (see `check_output`), another process
            writes the same job, or its folder is a link or belongs to another user.
        OSError: If the disk is full; the error names `path`.
    """
    inputs = tuple(inputs)
    check_output(path, inputs=inputs, overwrite=overwrite)
    target = Path(path).expanduser().resolve()
    digest = job and hashlib.sha256(job.encode()).hexdigest()[:16]
    with full_disk_names(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        check_output(path, inputs=inputs, overwrite=overwrite)
        with holding(target, digest) as holder:
            work = holder / NEW_NAME
            for leftover in work.glob(".*.partial*"):
                leftover.unlink()
            yield work
            flush_tree(work)
            # Check again: the target may have appeared while the block ran.
            check_output(path, inputs=inputs, overwrite=overwrite)
            put_in_place(holder, target)
            flush(target.parent)


class full_disk_names:
    """Make the error of a full disk name the output instead of a temporary file.

    The tokenizers package has no error class for a full disk: it raises an `Exception`
    whose text ends with the system's error number.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError):
            number = error.errno
        elif kind is Exception and (match := _OS_ERROR.search(str(error))):
            number = int(match[1])
        else:
            return
        if number in _FULL:
            reason = getattr(error, "strerror", None) or os.strerror(number)
            raise OSError(number, reason, self._path) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically: readers see the old text or the new one."""
    with _replacing(Path(path), suffix=".partial") as aside:
        aside.write_text(text, encoding="utf-8")


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, mx.array],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically; arrays read lazily from `path` stay valid.

    Args:
        path: The file to create or replace.
        tensors: The arrays by name.
        metadata: Text to store in the file's header.

    Raises:
        OSError: If the disk is full.
    """
    # MLX appends .safetensors to any other name.
    with _replacing(Path(path), suffix=".partial.safetensors") as aside:
        try:
            mx.save_safetensors(
                str(aside), dict(tensors), {"format": "mlx", **(metadata or {})}
            )
        except RuntimeError as error:
            if not str(error).startswith(_WRITE_FAILED):
                raise
            raise OSError(
                errno.ENOSPC,
                "it could not be written whole; the disk is full, or a limit on "
                "file size was reached",
                str(path),
            ) from error
        # Detects a truncated file before the old one is replaced.
        read_header(aside)


@contextlib.contextmanager
def _replacing(path: Path, *, suffix: str) -> Iterator[Path]:
    path = path.resolve()
    aside = aside_of(path, suffix)
    try:
        yield aside
        flush(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            flush(path)
    flush(folder)
