"""One training at a time in a folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_dora.errors import DoRAError
from mlx_dora.train.run.checkpoint import FOLDER_NAME

LOCK_NAME = ".lock"


@contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Hold a folder for one training; the system lets go when the process ends.

    A folder that was made here and got nothing else is gone afterwards.

    Args:
        folder: The adapter's folder; made if missing, with ``checkpoints/`` in it.

    Raises:
        DoRAError: If another process trains there.
        OSError: If the folder cannot be made or written to.
    """
    place = folder / FOLDER_NAME
    place.mkdir(parents=True, exist_ok=True)
    with (place / LOCK_NAME).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DoRAError(
                f"another training is going on in {folder}: wait for it, or choose "
                "another adapter_path."
            ) from error
        try:
            yield
        finally:
            if not any(p.name != LOCK_NAME for p in place.iterdir()):
                _remove_if_empty(folder, place)


def _remove_if_empty(folder: Path, place: Path) -> None:
    if any(path != place for path in folder.iterdir()):
        return
    (place / LOCK_NAME).unlink()
    place.rmdir()
    folder.rmdir()
