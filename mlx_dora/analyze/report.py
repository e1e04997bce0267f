"""The report: one self-contained HTML file that includes the analysis."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_dora.analyze.samples import SAMPLES_NAME, read_samples
from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse
from mlx_dora.page import name_of, provenance, render_page

_SCRIPT = Path(__file__).with_name("report.js")


def render_report(
    content: Mapping[str, Any], log: Path | None = None, command: Sequence[str] = ()
) -> str:
    """Return the report of an analysis or comparison as HTML.

    The page names the date, the version and the command; of local paths it shows only
    the last name.

    Args:
        content: Result of ``to_dict`` of the analysis or comparison.
        log: The training log, ``log.jsonl``; plotted if the file exists, as are the
            rewards in ``samples.jsonl`` beside it.
        command: The words of the command that makes the report, if any.

    Raises:
        DoRAError: If a log is not JSON lines of the right form.
    """
    page = {**content, "provenance": provenance(command)}
    for key in ("source", "base"):
        if key in page:
            page[key] = name_of(page[key])
    if "adapters" in page:
        page["adapters"] = page["labels"]
    if log is not None and log.is_file():
        page["log"] = _read_log(log)
        if (samples := log.with_name(SAMPLES_NAME)).is_file():
            page["samples"] = read_samples(samples)
    return render_page("mlx_dora analysis", page, _SCRIPT)


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
