"""Hidden folders beside an output, in which it is made and its predecessor kept.

A holder is private to its user and locked by its writer: what a killed process left can
be told from what a living one is writing.
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
def fresh_holder(target: Path) -> Iterator[Path]:
    """Make and hold ``.<name>.<random>.partial`` beside `target`; delete it afterwards.

    Yields the holder, with an empty folder ``new`` in it.
    """
    holder, handle = target, None
    while handle is None:
        holder = aside_of(target, ".partial")
        holder.mkdir(mode=0o700)
        # None: another process cleaned up here before the lock was ours.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            handle = _lock(holder)
    try:
        (holder / NEW_NAME).mkdir()
        yield holder
    finally:
        discard(holder, target)
        os.close(handle)


@contextlib.contextmanager
def lasting_holder(target: Path, digest: str) -> Iterator[Path]:
    """Make or take over ``.<name>.<digest>.resume`` beside `target`, and hold it.

    Yields the holder, with a folder ``new`` in it. An interrupt leaves it; any other
    error and success delete it.

    Raises:
        DoRAError: If another process holds it, or it is a link or another user's.
    """
    holder = target.with_name(f".{target.name}.{digest}.resume")
    handle = None
    while handle is None:
        with contextlib.suppress(FileExistsError):
            holder.mkdir(mode=0o700)
        if not _is_ours(holder):
            raise DoRAError(
                f"{holder} is a link or belongs to another user; refusing to go on "
                "from it: remove it or choose another output."
            )
        try:
            handle = _lock(holder)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            raise DoRAError(f"another process is writing {target}.") from None
    try:
        put_back(holder, target)
        (holder / NEW_NAME).mkdir(exist_ok=True)
        yield holder
        discard(holder, target)
    except KeyboardInterrupt:
        put_back(holder, target)
        raise
    except BaseException:
        discard(holder, target)
        raise
    finally:
        os.close(handle)


def put_in_place(holder: Path, target: Path) -> None:
    """Rename ``new`` of a holder to `target`; what is there moves to ``old`` first."""
    if target.exists():
        target.rename(holder / OLD_NAME)
    (holder / NEW_NAME).rename(target)


def put_back(holder: Path, target: Path) -> None:
    """Undo the first rename of `put_in_place` if the second did not follow."""
    old = holder / OLD_NAME
    if old.exists() and not target.exists():
        old.rename(target)


def discard(holder: Path, target: Path) -> None:
    """Delete a holder; the old folder in it returns to `target` if that is missing."""
    put_back(holder, target)
    shutil.rmtree(holder, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Delete what killed processes left beside `target`, and put back what they moved.

    Folders that a living process holds, of other users, or with other names stay.
    """
    pattern = re.compile(
        rf"\.{re.escape(target.name)}\.[0-9a-f]+\.(partial|resume)", re.DOTALL
    )
    try:
        found = [p for p in target.parent.iterdir() if pattern.fullmatch(p.name)]
    except PermissionError:  # a folder that may be written to but not listed
        return
    for holder in found:
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
                    "%s was being replaced when an earlier process was killed; the "
                    "old folder is back in its place",
                    target,
                )
            if holder.suffix == ".partial":
                shutil.rmtree(holder, ignore_errors=True)
        finally:
            os.close(handle)


def aside_of(path: Path, suffix: str) -> Path:
    """Return a free hidden name beside `path`, on the same file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{suffix}")


def _is_ours(holder: Path) -> bool:
    """Whether a name stands for a folder of this user's, not for a link."""
    try:
        state = holder.lstat()
    except FileNotFoundError:
        return True  # the next step makes it, or notices
    return holder.is_dir() and not holder.is_symlink() and state.st_uid == os.geteuid()


def _lock(holder: Path) -> int | None:
    """Lock a holder until the handle is closed; None if it was deleted meanwhile.

    Raises:
        BlockingIOError: If another process holds it.
        FileNotFoundError: If there is no such folder.
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
