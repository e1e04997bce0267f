"""Reading files of JSON lines: one JSON object per line."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_dora.data.config import DataConfig
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse


def read_jsonl(path: Path, config: DataConfig) -> Rows:
    """Read a file with one JSON object per line; blank lines are passed over.

    Raises:
        DoRAError: If a line is not a JSON object or there is none.
    """
    values: list[Any] = []
    lines: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                values.append(_row(line, path, number, is_first=not values))
                lines.append(number)
    if not values:
        raise DoRAError(f"{path} is empty: expected one JSON object per line.")
    return Rows(values=values, source=str(path), lines=lines, config=config)


def _row(line: bytes, path: Path, number: int, *, is_first: bool) -> Mapping[str, Any]:
    try:
        row = parse(line, f"{path}, line {number},")
    except DoRAError as error:
        cause = error.__cause__
        if not isinstance(cause, json.JSONDecodeError):
            raise
        text = cause.doc.rstrip()
        is_cut = is_first and cause.pos >= len(text)
        if is_cut and text.startswith("["):
            raise DoRAError(_layout(path, "a JSON array", ".[]")) from None
        if is_cut and text.startswith("{"):
            what = "a JSON object spread over several lines"
            raise DoRAError(_layout(path, what, ".")) from None
        raise DoRAError(
            f"{path}, line {number}: not JSON ({cause.msg} at character "
            f"{cause.pos + 1} of the line)."
        ) from None
    if is_first and isinstance(row, list) and any(isinstance(r, dict) for r in row):
        raise DoRAError(_layout(path, "a JSON array", ".[]"))
    if not isinstance(row, Mapping):
        raise DoRAError(
            f'{path}, line {number}: expected a JSON object such as {{"text": ...}}, '
            f"got a {type(row).__name__}."
        )
    return row


def _layout(path: Path, what: str, expression: str) -> str:
    return (
        f"{path} holds {what}; expected one JSON object per line. Rewrite it, for "
        f"instance with: jq -c '{expression}' {shlex.quote(path.name)} > new.jsonl"
    )
