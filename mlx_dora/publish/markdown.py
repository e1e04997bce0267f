"""Text of files and of this machine in Markdown that goes out to the world."""

import re
import shlex
from pathlib import Path

from mlx_dora.errors import printable

_MAX = 300
# What Markdown or HTML would act on inside a line.
_ACTIVE = re.compile(r"([\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_]))")
_INNER_PATH = re.compile(r"(?<![\w:/.])(?:~|/[^/\s'\",=:]+)(?:/[^/\s'\",=:]+)+/?")


def inline(text: str) -> str:
    """A name as plain text inside a line or a table's cell, whatever is in it."""
    return _ACTIVE.sub(r"\\\1", printable(text, _MAX))


def block(text: str) -> str:
    """Lines as a fenced block that nothing in them ends."""
    lines = [printable(line) for line in text.split("\n")]
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence, *lines, fence])


def without_folders(words: list[str]) -> str:
    """A command line with paths of this machine by their last name alone."""
    return shlex.join(_word(word) for word in words)


def name_of(path: str) -> str:
    """The last name of a local path; anything else as it is."""
    return Path(path.rstrip("/")).name or path if is_local(path) else path


def is_local(text: str) -> bool:
    """Whether a text is a path on this machine, not a Hub id."""
    if not text or "\0" in text or len(text) > 4096:
        return False
    path = Path(text)
    starts = text.startswith(("~", "./", "../")) or path.is_absolute()
    return starts or text.count("/") > 1 or ("/" in text and path.exists())


def _word(word: str) -> str:
    flag, equals, value = word.partition("=")
    if equals and flag.startswith("-") and is_local(value):
        return f"{flag}={name_of(value)}"
    if is_local(word) and not re.match(r"\w+://", word):
        return name_of(word)
    return _INNER_PATH.sub(lambda found: name_of(found[0]), word)
