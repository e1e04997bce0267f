"""The report: one HTML file that needs nothing else, with the analysis inside."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_dora.errors import DoRAError

_TEMPLATE = Path(__file__).with_name("report.html")


def render_report(content: Mapping[str, Any], log: Path | None = None) -> str:
    """The report of an analysis or comparison.

    Args:
        content: What ``to_dict`` of either gives.
        log: The training's ``log.jsonl``; drawn if there is such a file.

    Raises:
        DoRAError: If the log is not JSON lines.
    """
    page = dict(content)
    if log is not None and log.is_file():
        page["log"] = _read_log(log)
    text = json.dumps(page, ensure_ascii=False, allow_nan=False)
    # So that no name in the data can end the script element.
    text = text.replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", text)


def _read_log(path: Path) -> list[dict[str, Any]]:
    found = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DoRAError(f"{path}, line {i} is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise DoRAError(f"{path}, line {i} is not a JSON object.")
        found.append({k: row.get(k) for k in ("step", "train_loss", "val_loss")})
    return found
