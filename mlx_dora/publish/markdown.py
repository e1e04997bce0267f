"""Makes text from files safe for public Markdown."""

import re

from mlx_dora.errors import printable

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
