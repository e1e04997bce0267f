"""Short reprs and HTML tables of results, for a prompt and for a notebook."""

from collections.abc import Sequence
from html import escape
from typing import Any

from mlx_dora.errors import printable

MAX_REPR = 200
"""Characters of a repr."""
MAX_ROWS = 20
"""Rows of an HTML table."""


class Shown:
    """Base of results; a subclass gives `facts` and, if it has parts, `table`.

    A dataclass needs ``repr=False`` to inherit the repr.
    """

    def facts(self) -> dict[str, Any]:
        """Return the few values that say what this is."""
        raise NotImplementedError

    def table(self) -> Sequence[dict[str, Any]]:
        """Return the parts as rows with the same keys, the most important first."""
        return ()

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={_text(v, repr)}" for k, v in self.facts().items())
        text = f"{type(self).__name__}({inside})"
        return text if len(text) <= MAX_REPR else f"{text[: MAX_REPR - 4]}...)"

    def _repr_html_(self) -> str:
        facts = [(name, value) for name, value in self.facts().items()]
        parts = [f"<b>{_html(type(self).__name__)}</b>", _table((), facts)]
        if rows := self.table():
            shown = [tuple(row.values()) for row in rows[:MAX_ROWS]]
            parts.append(_table(tuple(rows[0]), shown))
        if len(rows) > MAX_ROWS:
            parts.append(f"<p>and {len(rows) - MAX_ROWS} more</p>")
        return "".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["".join(f"<th>{_html(cell)}</th>" for cell in header)] if header else []
    lines += ["".join(f"<td>{_html(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _html(value: Any) -> str:
    return escape(printable(_text(value, str)))


def _text(value: Any, show: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else show(value)
    return text if len(text) <= 80 else f"{text[:38]}...{text[-38:]}"
