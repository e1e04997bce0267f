"""JSON files as everything here reads them: one line for whatever is wrong."""

import json
from pathlib import Path
from typing import Any

from mlx_dora.errors import DoRAError


def parse(text: str | bytes, where: object) -> Any:
    """Parse JSON text.

    Args:
        text: The text; a byte order mark at its start is skipped.
        where: What the error names: a file, or a file and line.

    Raises:
        DoRAError: If it is not JSON, not UTF-8, nested too deeply, or holds a number
            of thousands of digits.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise DoRAError(f"{where} is not usable JSON: nested too deeply.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are such
        raise DoRAError(f"{where} is not JSON: {error}.") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a file that must hold a JSON object.

    Raises:
        DoRAError: If it holds anything else; the message names the file.
        OSError: If it cannot be read.
    """
    content = parse(Path(path).read_bytes(), path)
    if not isinstance(content, dict):
        raise DoRAError(f"{path} must hold a JSON object, got {content!r:.60}.")
    return content
