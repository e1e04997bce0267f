"""Writes the table of methods into a page: ``python -m mlx_dora.merge.methods.page``.

The page is ``docs/merging.md``; the new table replaces the old one.
"""

import sys
from pathlib import Path

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


def put_table(page: str) -> str:
    """Replace the table in a page of Markdown; its first cell is ``--method``."""
    before, _, rest = page.partition("\n| `--method` |")
    lines = rest.split("\n")
    end = next(i for i, line in enumerate(lines[1:], 1) if not line.startswith("|"))
    return "\n".join([before, docs_table(), *lines[end:]])


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/merging.md")
    path.write_text(put_table(path.read_text(encoding="utf-8")), encoding="utf-8")
