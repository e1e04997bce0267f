"""Writes that are complete or absent: aside first, flushed to disk, then renamed."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.io.header import read_header

_WRITE_FAILED = "[write]"
"""How MLX begins to tell that the system did not take all bytes."""


def check_output(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder that cannot or must not be written, before any work.

    Raises:
        DoRAError: If `path` exists and `overwrite` is false, or overwriting it would
            delete the working or home directory, or it has no name.
    """
    target = Path(path).resolve()
    if not target.name:
        raise DoRAError(f"{path} cannot be an output folder.")
    if not target.exists():
        return
    if not overwrite:
        raise DoRAError(
            f"{path} already exists; choose another output or say overwrite "
            "(--overwrite on the command line)."
        )
    for kept in (Path.cwd(), Path.home()):
        if kept.resolve().is_relative_to(target):
            raise DoRAError(f"{path} holds {kept}; refusing to overwrite it.")


@contextlib.contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder that appears complete or not at all.

    Yields a fresh folder beside `path`. When the block ends well, everything in it is
    flushed to disk and the folder is renamed to `path`; when it raises, the folder is
    deleted and `path` is as before. A process killed inside leaves at most a hidden
    ``.<name>.*.partial`` folder beside it; one killed while it overwrites may leave the
    old folder in ``.<name>.*.old``.

    Args:
        path: The folder to make. Its parents are made if missing.
        overwrite: Replace an existing `path`: it is moved aside before the rename and
            deleted last.

    Raises:
        DoRAError: If `path` exists and `overwrite` is false.
    """
    check_output(path, overwrite=overwrite)
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = aside_of(target, ".partial")
    work.mkdir()
    try:
        yield work
        flush_tree(work)
        # Once more: the target may have appeared while the block ran.
        check_output(path, overwrite=overwrite)
        put_in_place(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


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
                f"{path} could not be written whole; the disk is full, or a limit on "
                "the size of files is reached."
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


def put_in_place(work: Path, target: Path) -> None:
    """Rename a complete folder to `target`; an old one goes aside first, then away."""
    if not target.exists():
        work.rename(target)
        flush(target.parent)
        return
    # An empty folder of its own holds the old one, so that no other name is hit.
    holder = aside_of(target, ".old")
    holder.mkdir()
    old = holder / target.name
    target.rename(old)
    try:
        work.rename(target)
    except BaseException:
        old.rename(target)
        holder.rmdir()
        raise
    flush(target.parent)
    shutil.rmtree(holder)


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


def aside_of(path: Path, suffix: str) -> Path:
    """Return a free hidden name beside `path`, on the same file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{suffix}")
