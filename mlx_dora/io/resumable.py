"""A folder whose writing goes on where a killed process stopped."""

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

    Like `atomic_directory`, but the folder beside `path` is named after the job: a
    process that is killed or interrupted leaves it, and the next with the same `path`
    and `job` is given what is in it. An error in the block deletes it.

    Args:
        path: The folder to make.
        job: All that determines the output, as text.
        inputs: All that is read to make it; see `check_output`.
        overwrite: Replace an existing `path`.

    Raises:
        DoRAError: If `path` must not be written (see `check_output`), another process
            is writing the same, or what is to be resumed is a link or another user's.
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
            # Once more: the target may have appeared while the block ran.
            check_output(path, inputs=inputs, overwrite=overwrite)
            put_in_place(holder, target)
            flush(target.parent)
