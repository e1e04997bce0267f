"""Griffe extensions of the site: equations as MathML, and options with their help."""

import ast
import re
from typing import Any

from griffe import Attribute, Docstring, ExprCall, ExprKeyword, Extension, Object
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


class Options(Extension):
    """Shows a field made by ``option(default, help=...)`` as its default and help."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        """Take value and docstring of a field from the call that declares it."""
        call = attr.value
        if not isinstance(call, ExprCall) or str(call.function) != "option":
            return
        for argument in call.arguments:
            if isinstance(argument, ExprKeyword):
                if argument.name == "help" and not attr.docstring:
                    text = ast.literal_eval(str(argument.value))
                    attr.docstring = Docstring(text, parent=attr)
            elif attr.value is call:
                attr.value = argument
