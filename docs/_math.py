"""Griffe extension of the site: equations of docstrings as MathML, without scripts."""

import re
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert

EQUATION = re.compile(
    r"^(?P<pad> *)\.\. math::[ ]*(?P<first>[^\n]*)\n"
    r"(?P<rest>(?:\n|(?P=pad) +[^\n]*\n)*)",
    re.MULTILINE,
)


def _mathml(match: re.Match[str]) -> str:
    lines = [match["first"], *match["rest"].splitlines()]
    latex = " ".join(line.strip() for line in lines if line.strip())
    pad = match["pad"]
    return f"{pad}<div>{convert(latex, display='block')}</div>\n\n"


class Equations(Extension):
    """Replaces ``.. math::`` by MathML before a docstring is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of an object that has equations."""
        if obj.docstring and ".. math::" in obj.docstring.value:
            obj.docstring.value = EQUATION.sub(_mathml, obj.docstring.value + "\n")
