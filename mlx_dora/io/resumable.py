"""A folder whose writing goes on where a killed process stopped."""

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import check_output, flush_tree, put_in_place


@contextlib.contextmanager
def resumable_directory(
    path: str | Path, job: str, *, overwrite: bool = False
) -> Iterator[Path]:
    """Write a folder that appears complete or not at all, and can be gone on with.

    Like `atomic_directory`, but the folder beside `path` is named after the job: a
    process that is killed or interrupted leaves it, and the next with the same `path`
    and `job` is given what is in it. An error in the block deletes it.

    Args:
        path: The folder to make.
        job: All that determines the output, as text.
        overwrite: Replace an existing `path`.

    Raises:
        DoRAError: If `path` exists and `overwrite` is false, or another process is
            writing the same.
    """
    check_output(path, overwrite=overwrite)
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(job.encode()).hexdigest()[:16]
    work = target.with_name(f".{target.name}.{digest}.resume")
    lock_path = target.with_name(f".{target.name}.{digest}.lock")
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DoRAError(f"another process is writing {path}.") from None
        work.mkdir(exist_ok=True)
        for leftover in work.glob(".*.partial*"):
            leftover.unlink()
        try:
            yield work
            flush_tree(work)
            # Once more: the target may have appeared while the block ran.
            check_output(path, overwrite=overwrite)
            put_in_place(work, target)
        except KeyboardInterrupt:
            raise
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            lock_path.unlink(missing_ok=True)
