"""Makes text from files and from this machine safe for public Markdown."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_dora.errors import printable
from mlx_dora.page import local
from mlx_dora.publish.names import name_of

_MAX = 300
# Characters with a meaning in Markdown or HTML inside a line.
_ACTIVE = re.compile(r"([\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_]))")


def inline(text: str) -> str:
    """Escape a name so that it is plain text inside a line or a table cell."""
    return _ACTIVE.sub(r"\\\1", printable(text, _MAX))


def block(text: str) -> str:
    """Return lines as a fenced block that their content cannot end."""
    lines = [printable(line) for line in text.split("\n")]
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence, *lines, fence])


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table; escapes the cells and rounds their numbers."""
    lines = [heads, ["---"] * len(heads), *([_cell(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def without_folders(words: Sequence[str]) -> str:
    """Join a command line, reducing local paths to their last name or Hub id."""
    return local.without_folders(words, name_of)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{inline(str(k))} {_cell(item)}" for k, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return inline(name_of(str(value)))
