"""Writes that are complete or absent: aside first, flushed to disk, then renamed."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import mlx.core as mx

from mlx_dora.io.aside import (
    NEW_NAME,
    aside_of,
    fresh_holder,
    put_in_place,
    remove_leftovers,
)
from mlx_dora.io.header import read_header
from mlx_dora.io.output import Inputs, check_output

__all__ = [
    "atomic_directory",
    "check_output",
    "flush",
    "flush_tree",
    "write_tensors",
    "write_text",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_OS_ERROR = re.compile(r"\(os error (\d+)\)$")

_WRITE_FAILED = "[write]"
"""How MLX begins to tell that the system did not take all bytes."""


@contextlib.contextmanager
def atomic_directory(
    path: str | Path, *, inputs: Inputs, overwrite: bool = False
) -> Iterator[Path]:
    """Write a folder that appears complete or not at all.

    Yields a fresh folder aside. When the block ends well, everything in it is flushed
    to disk and the folder is renamed to `path`; when it raises, the folder is deleted
    and `path` is as before. A process killed inside leaves at most a hidden
    ``.<name>.*.partial`` folder beside it, which the next one with the same `path`
    removes. If it was killed while replacing an old folder, that one returns.

    Args:
        path: The folder to make. Its parents are made if missing.
        inputs: All that is read to make it; see `check_output`.
        overwrite: Replace an existing `path`: it is moved aside before the rename and
            deleted last.

    Raises:
        DoRAError: If `path` must not be written; see `check_output`.
        OSError: If the disk is full; the error names `path`.
    """
    inputs = tuple(inputs)
    check_output(path, inputs=inputs, overwrite=overwrite)
    target = Path(path).expanduser().resolve()
    with full_disk_names(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        check_output(path, inputs=inputs, overwrite=overwrite)
        with fresh_holder(target) as holder:
            yield holder / NEW_NAME
            flush_tree(holder / NEW_NAME)
            # Once more: the target may have appeared while the block ran.
            check_output(path, inputs=inputs, overwrite=overwrite)
            put_in_place(holder, target)
            flush(target.parent)


class full_disk_names:
    """Make the error of a full disk name an output instead of some file aside.

    The tokenizers package has no class of its own for it: its error is an `Exception`
    that ends with the system's number.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            number = error.errno
        elif kind is Exception and (told := _OS_ERROR.search(str(error))):
            number = int(told[1])
        else:
            return
        if number in _FULL:
            raise OSError(number, os.strerror(number), self._path) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file at once: readers see the old text or the new, never a part."""
    with _replacing(Path(path), suffix=".partial") as aside:
        aside.write_text(text, encoding="utf-8")


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, mx.array],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file at once; arrays lazily read from `path` stay valid.

    Args:
        path: The file to make or replace.
        tensors: Name to array.
        metadata: Text kept in the file's header.

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
                "it could not be written whole; the disk is full, or a limit on the "
                "size of files is reached",
                str(path),
            ) from error
        # A file that is cut short shows here, before the old one is gone.
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
    """Flush a file, or what a folder says of its files, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Flush a folder and all that is in it to disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            flush(path)
    flush(folder)
