"""The report: one self-contained HTML file that includes the analysis."""

import base64
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse

_TEMPLATE = Path(__file__).with_name("report.html")


def render_report(content: Mapping[str, Any], log: Path | None = None) -> str:
    """Return the report of an analysis or comparison as HTML.

    Args:
        content: Result of ``to_dict`` of the analysis or comparison.
        log: The training log, ``log.jsonl``; plotted if the file exists.

    Raises:
        DoRAError: If the log is not JSON lines.
    """
    page = dict(content)
    if log is not None and log.is_file():
        page["log"] = _read_log(log)
    text = json.dumps(page, ensure_ascii=False, allow_nan=False)
    # Prevents names in the data from ending the script element.
    text = text.replace("<", "\\u003c")
    template = _TEMPLATE.read_text(encoding="utf-8")
    return template.replace("@POLICY@", _policy(template)).replace("@DATA@", text)


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Read steps and losses of a log; a loss that is not finite leaves a gap."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse(line, where)
        if not isinstance(row, dict):
            raise DoRAError(f"{where} must hold a JSON object, got {row!r:.40}.")
        step = row.get("step")
        if type(step) is not int or not 0 <= step < 2**53:
            raise DoRAError(f"{where}: step must be a whole number, got {step!r:.40}.")
        losses = {}
        for name in ("train_loss", "val_loss"):
            value = row.get(name)
            if value is not None and type(value) not in (int, float):
                raise DoRAError(f"{where}: {name} must be a number, got {value!r:.40}.")
            is_point = value is not None and abs(value) <= sys.float_info.max
            losses[name] = value if is_point else None
        rows.append({"step": step, **losses})
    return rows


def _policy(page: str) -> str:
    """Return a content security policy that allows only the page's script and style.

    Even if a name in the data were interpreted as markup, it could neither run a script
    nor contact a server. Bars and dots need inline ``style`` attributes.
    """
    hashes = []
    for element in ("script", "style"):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes.append(f"'sha256-{digest}'")
    script, style = hashes
    return (
        f"default-src 'none'; script-src {script}; style-src-elem {style}; "
        "style-src-attr 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
