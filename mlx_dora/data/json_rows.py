"""Reading rows from JSON: an array of objects, or one object per line."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_dora.data.config import DataConfig
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse


def read_json_rows(path: Path, config: DataConfig) -> Rows:
    """Read a JSON array, or a file with one JSON object per line.

    Blank lines are skipped.

    Raises:
        DoRAError: If an entry is not a JSON object, or there is none.
    """
    unit: str = "line"
    with path.open("rb") as file:
        lines = enumerate(file, start=1)
        first, start = next(((n, line) for n, line in lines if line.strip()), (1, b""))
        file.seek(0)
        if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            array = parse(file.read(), f"{path}, the JSON array from line {first},")
            unit, entries = "entry", list(enumerate(array, start=1))
        else:
            entries = [
                (number, _line(line, path, number))
                for number, line in enumerate(file, start=1)
                if line.strip()
            ]
    for number, row in entries:
        if not isinstance(row, Mapping):
            raise DoRAError(
                f"{path}, {unit} {number}: expected a JSON object such as "
                f'{{"text": ...}}, got a {type(row).__name__}.'
            )
    if not entries:
        raise DoRAError(
            f"{path} is empty: expected one JSON object per line, or an array of them."
        )
    return Rows(
        values=[row for _, row in entries],
        source=str(path),
        lines=[number for number, _ in entries],
        unit=unit,
        config=config,
    )


def _line(line: bytes, path: Path, number: int) -> Any:
    try:
        return parse(line, f"{path}, line {number},")
    except DoRAError as error:
        cause = error.__cause__
        if not isinstance(cause, json.JSONDecodeError):
            raise
        text = cause.doc.rstrip()
        if text.startswith("{") and cause.pos >= len(text):
            raise DoRAError(
                f"{path}, line {number}: a JSON object spread over several lines; "
                "expected one object per line, or an array of objects. Rewrite it, for "
                f"instance with: jq -c . {shlex.quote(path.name)} > new.jsonl"
            ) from None
        raise DoRAError(
            f"{path}, line {number}: not JSON ({cause.msg} at character "
            f"{cause.pos + 1} of the line)."
        ) from None
