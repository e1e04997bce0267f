"""Hidden folders beside an output that hold the new version and the one it replaces.

A holder is private to its user and locked by its writer. The lock distinguishes a
folder in use from one that a killed process left behind.
"""

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlx_dora.errors import DoRAError

LOCK_NAME, NEW_NAME, OLD_NAME = "lock", "new", "old"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def holding(target: Path, digest: str | None = None) -> Iterator[Path]:
    """Create and lock a holder beside `target`, with a folder ``new`` in it.

    Without a digest, creates ``.<name>.<random>.partial`` and deletes it at the end.
    With one, creates or reuses ``.<name>.<digest>.resume``; an interrupt keeps it, and
    success and any other error delete it.

    Raises:
        DoRAError: If another process has locked the holder, or the holder is a link or
            belongs to another user.
    """
    holder, handle = target, None
    while handle is None:
        holder = aside_of(target, ".partial")
        if digest is not None:
            holder = target.with_name(f".{target.name}.{digest}.resume")
        with contextlib.suppress(FileExistsError):
            holder.mkdir(mode=0o700)
        if not _is_ours(holder):
            raise DoRAError(
                f"{holder} is a link or belongs to another user; refusing to resume "
                "from it: remove it or choose another output."
            )
        try:
            handle = _lock(holder)
        except FileNotFoundError:  # deleted by another process before it was locked
            continue
        except BlockingIOError:
            if digest is not None:
                raise DoRAError(f"another process is writing {target}.") from None
    is_kept = False
    try:
        put_back(holder, target)
        (holder / NEW_NAME).mkdir(exist_ok=True)
        yield holder
    except KeyboardInterrupt:
        is_kept = digest is not None
        raise
    finally:
        put_back(holder, target)
        if not is_kept:
            discard(holder, target)
        os.close(handle)


def put_in_place(holder: Path, target: Path) -> None:
    """Rename the holder's ``new`` to `target`; an old target moves to ``old`` first."""
    if target.exists():
        target.rename(holder / OLD_NAME)
    (holder / NEW_NAME).rename(target)


def put_back(holder: Path, target: Path) -> None:
    """Restore the old target if `put_in_place` stopped between its two renames."""
    old = holder / OLD_NAME
    if old.exists() and not target.exists():
        old.rename(target)


def discard(holder: Path, target: Path) -> None:
    """Delete a holder, after restoring its old folder if `target` is missing."""
    put_back(holder, target)
    shutil.rmtree(holder, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Delete what killed processes left beside `target`, and restore what they moved.

    Keeps folders that a running process has locked, that belong to other users, or
    that have other names.
    """
    pattern = re.compile(
        rf"\.{re.escape(target.name)}\.[0-9a-f]+\.(partial|resume)", re.DOTALL
    )
    try:
        holders = [p for p in target.parent.iterdir() if pattern.fullmatch(p.name)]
    except PermissionError:  # a folder that can be written to but not listed
        return
    for holder in holders:
        if not _is_ours(holder):
            continue
        try:
            handle = _lock(holder)
        except (BlockingIOError, FileNotFoundError):
            continue
        if handle is None:
            continue
        try:
            had_target = target.exists()
            put_back(holder, target)
            if not had_target and target.exists():
                logger.warning(
                    "an earlier process was killed while replacing %s; the old folder "
                    "has been restored",
                    target,
                )
            if holder.suffix == ".partial":
                shutil.rmtree(holder, ignore_errors=True)
        finally:
            os.close(handle)


def aside_of(path: Path, suffix: str) -> Path:
    """Return an unused hidden name beside `path`, on the same file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{suffix}")


def _is_ours(holder: Path) -> bool:
    """Whether a path is missing or a folder of this user, and not a link."""
    try:
        state = holder.lstat()
    except FileNotFoundError:
        return True  # the next step creates it or reports the error
    return holder.is_dir() and not holder.is_symlink() and state.st_uid == os.geteuid()


def _lock(holder: Path) -> int | None:
    """Lock a holder until the handle is closed; None if it was deleted meanwhile.

    Raises:
        BlockingIOError: If another process has locked it.
        FileNotFoundError: If the folder does not exist.
    """
    path = holder / LOCK_NAME
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), path.lstat()):
            return handle
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None
