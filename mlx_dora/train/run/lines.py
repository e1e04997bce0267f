"""A file of JSON lines that a training appends to, and cuts when it is resumed."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_dora.errors import DoRAError


class Lines:
    """JSON lines in a training's folder.

    The first line makes the folder and replaces the file of an earlier training, unless
    the file was continued.

    Args:
        path: The file, or None to write nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._is_begun = False

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows at the end."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        mode = "a" if self._is_begun else "w"
        with self._path.open(mode, encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._is_begun = True

    def position(self) -> int:
        """Flush the file to disk and return its length in bytes."""
        if self._path is None or not self._is_begun:
            return 0
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def restore(self, path: Path, position: int) -> bytes:
        """Continue a file after its first `position` bytes; discard the rest.

        Args:
            path: The file, also for a log that writes nothing.
            position: Value of `position` in the run to be resumed.

        Returns:
            The bytes that are kept.

        Raises:
            DoRAError: If the file is shorter than `position`.
        """
        content = path.read_bytes()[:position] if path.exists() else b""
        if len(content) < position:
            raise DoRAError(
                f"{path} has {len(content)} bytes, but had {position} when the "
                "checkpoint was written: restore the file, or start over with "
                "--overwrite."
            )
        if self._path is not None and position:
            os.truncate(path, position)
            self._is_begun = True
        return content
