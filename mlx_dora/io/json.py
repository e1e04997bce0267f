"""JSON files as everything here reads them: one line for whatever is wrong."""

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
        where: What the error names: a file, or a file and line.
        max_number: Refuse whole numbers beyond it.

    Raises:
        DoRAError: If it is not JSON, not UTF-8, nested too deeply, or holds a number
            of thousands of digits.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        whole = None if max_number is None else partial(_whole, max_number)
        return json.loads(text.removeprefix("\ufeff"), parse_int=whole)
    except RecursionError:
        raise DoRAError(f"{where} is not usable JSON: nested too deeply.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are such
        raise DoRAError(f"{where} is not JSON: {error}.") from error


def _whole(limit: float, digits: str) -> int:
    number = int(digits)
    if abs(number) > limit:
        raise ValueError(f"{digits:.20}... is too large a number")
    return number


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a file that must hold a JSON object; its numbers fit into a float.

    Raises:
        DoRAError: If it holds anything else; the message names the file.
        OSError: If it cannot be read.
    """
    content = parse(Path(path).read_bytes(), path, max_number=sys.float_info.max)
    if not isinstance(content, dict):
        raise DoRAError(f"{path} must hold a JSON object, got {content!r:.60}.")
    return content
