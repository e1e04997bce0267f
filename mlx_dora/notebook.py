"""Short reprs and HTML tables of results, and live output in a notebook."""

import sys
from collections.abc import Sequence
from html import escape
from typing import Any
from uuid import uuid4

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
        parts = [f"<b>{_html(type(self).__name__)}</b>", html_table((), facts)]
        if rows := self.table():
            shown = [tuple(row.values()) for row in rows[:MAX_ROWS]]
            parts.append(html_table(tuple(rows[0]), shown))
        if len(rows) > MAX_ROWS:
            parts.append(f"<p>and {len(rows) - MAX_ROWS} more</p>")
        return "".join(parts)


def _shell() -> Any:
    """Return the running IPython shell, or None; never imports IPython."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def in_notebook() -> bool:
    """Whether the code runs in an IPython kernel, whose outputs can show HTML."""
    return getattr(_shell(), "kernel", None) is not None


class LiveOutput:
    """An output below a notebook's cell whose content can be replaced."""

    def __init__(self) -> None:
        self._id = uuid4().hex
        self._is_new = True

    def show(self, html: str, text: str) -> None:
        """Show `html`, or `text` where a frontend shows no HTML, instead of before."""
        _shell().display_pub.publish(
            data={"text/html": html, "text/plain": text},
            transient={"display_id": self._id},
            update=not self._is_new,
        )
        self._is_new = False


def html_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return an HTML table with escaped cells and rounded numbers."""
    lines = ["".join(f"<th>{_html(cell)}</th>" for cell in header)] if header else []
    lines += ["".join(f"<td>{_html(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _html(value: Any) -> str:
    return escape(printable(_text(value, str)))


def _text(value: Any, show: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else show(value)
    return text if len(text) <= 80 else f"{text[:38]}...{text[-38:]}"
