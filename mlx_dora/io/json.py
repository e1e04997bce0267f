"""Reads JSON and reports any problem with it in one line."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from mlx_dora.errors import DoRAError


def parse(text: str | bytes, where: object, *, max_number: float | None = None) -> Any:
    """Parse JSON text.

    Args:
        text: The text; a byte order mark at its start is skipped.
        where: The file, or file and line, that the error names.
        max_number: Largest absolute value of an integer; None for no limit.

    Raises:
        DoRAError: If the text is not JSON, not UTF-8, nested too deeply, or holds a
            number with thousands of digits.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        whole = None if max_number is None else partial(_whole, max_number)
        return json.loads(text.removeprefix("\ufeff"), parse_int=whole)
    except RecursionError:
        raise DoRAError(f"{where} is not usable JSON: nested too deeply.") from None
    except ValueError as error:  # includes JSONDecodeError and UnicodeDecodeError
        raise DoRAError(f"{where} is not JSON: {error}.") from error


def _whole(limit: float, digits: str) -> int:
    number = int(digits)
    if abs(number) > limit:
        raise ValueError(f"{digits:.20}... is too large a number")
    return number


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a file that must hold a JSON object whose integers fit into a float.

    Raises:
        DoRAError: If the file holds anything else; the message names the file.
        OSError: If the file cannot be read.
    """
    content = parse(Path(path).read_bytes(), path, max_number=sys.float_info.max)
    if not isinstance(content, dict):
        raise DoRAError(f"{path} must hold a JSON object, got {content!r:.60}.")
    return content
