"""Writes a folder and continues where a killed process stopped."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from mlx_dora.io.aside import NEW_NAME, lasting_holder, put_in_place, remove_leftovers
from mlx_dora.io.atomic import flush, flush_tree, full_disk_names
from mlx_dora.io.output import Inputs, check_output


@contextlib.contextmanager
def resumable_directory(
    path: str | Path, job: str, *, inputs: Inputs, overwrite: bool = False
) -> Iterator[Path]:
    """Write a folder that appears complete or not at all, and can be resumed.

    Works like `atomic_directory`, but names the temporary folder after the job. A
    killed or interrupted process leaves this folder, and the next call with the same
    `path` and `job` yields it with its content. An error in the block deletes it.

    Args:
        path: The folder to create.
        job: Text that contains everything that determines the output.
        inputs: All files and folders that are read; see `check_output`.
        overwrite: Replace an existing `path`.

    Raises:
        DoRAError: If `path` must not be written (see `check_output`), another process
            is writing it, or the folder to resume is a link or belongs to another user.
        OSError: If the disk is full; the error names `path`.
    """
    inputs = tuple(inputs)
    check_output(path, inputs=inputs, overwrite=overwrite)
    target = Path(path).expanduser().resolve()
    digest = hashlib.sha256(job.encode()).hexdigest()[:16]
    with full_disk_names(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        check_output(path, inputs=inputs, overwrite=overwrite)
        with lasting_holder(target, digest) as holder:
            work = holder / NEW_NAME
            for leftover in work.glob(".*.partial*"):
                leftover.unlink()
            yield work
            flush_tree(work)
            # Check again: the target may have appeared while the block ran.
            check_output(path, inputs=inputs, overwrite=overwrite)
            put_in_place(holder, target)
            flush(target.parent)
