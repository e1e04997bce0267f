"""The one exception that means: something the user can put right."""

import unicodedata

MAX_LENGTH = 800
"""Characters of an error line; what is longer is cut, since names come from files."""


def printable(text: str, limit: int | None = None) -> str:
    r"""Return text that is safe to show on a terminal, in one line.

    Names and messages that come from a file may hold escape sequences that retitle or
    clear a terminal. Characters that do not print (controls, line ends, direction
    marks, half surrogates) become ``\x1b``-like escapes; the rest stays.

    Args:
        text: Any text.
        limit: Greatest length in characters; longer text is cut in the middle.
    """
    escaped = "".join(
        c if _shows(c) else c.encode("unicode_escape").decode() for c in text
    )
    if limit is None or len(escaped) <= limit:
        return escaped
    cut = f" ... [{len(escaped) - limit} more characters] ... "
    tail = limit // 4
    return escaped[: limit - tail] + cut + escaped[-tail:]


def _shows(character: str) -> bool:
    # `isprintable` denies spaces that French and Japanese write, and the joiners that
    # Persian, Indic scripts and emoji need.
    return (
        character.isprintable()
        or unicodedata.category(character) == "Zs"
        or character in "\u200c\u200d"
    )


class DoRAError(ValueError):
    """Bad input: one line that says what, what was expected, what came, how to fix it.

    The command line prints the message alone and exits with code 1. Mistakes in calling
    code raise `TypeError` instead, and the operating system's `OSError` passes through.
    The message is made printable and at most a few hundred characters long.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, MAX_LENGTH))
