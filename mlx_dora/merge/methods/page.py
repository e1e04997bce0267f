"""Writes the tables of methods into a page: ``python -m mlx_dora.merge.methods.page``.

The page is ``docs/merging.md``; the new tables of methods, spaces, rules for magnitudes
and calibrations replace the old ones.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_dora.merge.methods.calibrations import CALIBRATIONS
from mlx_dora.merge.methods.magnitudes import RULES
from mlx_dora.merge.methods.method import MergeMethod
from mlx_dora.merge.methods.spaces import SPACES
from mlx_dora.merge.methods.table import DEFAULT, METHODS

_HEAD = (
    "| `--method` | a merged row, or entry | inputs | base of models | density | "
    "adapters | mergekit | paper |"
)
_BASES = {
    "unused": "-",
    "optional": "optional: changes from it",
    "lengths": "required: its row lengths",
    "changes": "required: changes from it",
}


def docs_table() -> str:
    """Make the table in Markdown, with one line for each method."""
    rule = "| --- " * _HEAD.count(" | ") + "| --- |"
    return "\n".join([_HEAD, rule, *map(_line, METHODS.values())])


def _line(entry: MergeMethod) -> str:
    fewest, most = entry.inputs
    inputs = f"{fewest}" if fewest == most else f"{fewest} or more"
    if entry.needs_fisher:
        adapters = "exact by row, SVD by element"
    elif entry.is_exact:
        adapters = "exact"
    elif SPACES[entry.space].coordinates:
        adapters = f"in {entry.space} space"
    else:
        adapters = "dense matrix, SVD"
    kits = ", ".join(f"`{kit.name}`" for kit in entry.mergekit)
    default = " (default)" if entry.name == DEFAULT else ""
    cells = (
        f"`{entry.name}`{default}",
        entry.summary,
        inputs,
        _BASES[entry.base],
        "-" if entry.density is None else str(entry.density),
        adapters,
        kits or "-",
        entry.paper or "-",
    )
    return f"| {' | '.join(cells)} |"


def space_table() -> str:
    """Make the table of spaces in Markdown."""
    rows = [
        (f"`{e.name}`", e.summary, "required" if e.needs_rank else "-", e.paper or "-")
        for e in SPACES.values()
    ]
    return _table(("`--space`", "coordinates", "`--rank`", "paper"), rows)


def rule_table() -> str:
    """Make the table of rules for magnitudes in Markdown."""
    rows = [(f"`{entry.name}`", entry.summary) for entry in RULES.values()]
    return _table(("`--magnitudes`", "a merged magnitude"), rows)


def calibration_table() -> str:
    """Make the table of calibrations in Markdown."""
    rows = [(f"`{e.name}`", e.summary, e.paper) for e in CALIBRATIONS.values()]
    return _table(("`--calibrate`", "before the merge", "paper"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


TABLES = (docs_table, space_table, rule_table, calibration_table)


def put_tables(page: str) -> str:
    """Replace the tables in a page of Markdown, recognized by their first cells."""
    for make in TABLES:
        table = make()
        before, _, rest = page.partition("\n" + table[: table.index("|", 1) + 1])
        lines = rest.split("\n")
        ends = (i for i, line in enumerate(lines[1:], 1) if not line.startswith("|"))
        page = "\n".join([before, table, *lines[next(ends) :]])
    return page


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/merging.md")
    path.write_text(put_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
