"""Makes text from files and from this machine safe for public Markdown."""

import re
import shlex
from pathlib import Path

from mlx_dora.errors import printable

_MAX = 300
# Characters with a meaning in Markdown or HTML inside a line.
_ACTIVE = re.compile(r"([\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_]))")
_INNER_PATH = re.compile(r"(?<![\w:/.])(?:~|/[^/\s'\",=:]+)(?:/[^/\s'\",=:]+)+/?")


def inline(text: str) -> str:
    """Escape a name so that it is plain text inside a line or a table cell."""
    return _ACTIVE.sub(r"\\\1", printable(text, _MAX))


def block(text: str) -> str:
    """Return lines as a fenced block that their content cannot end."""
    lines = [printable(line) for line in text.split("\n")]
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence, *lines, fence])


def without_folders(words: list[str]) -> str:
    """Join a command line, reducing local paths to their last name."""
    return shlex.join(_word(word) for word in words)


def name_of(path: str) -> str:
    """Return the last name of a local path; return any other text unchanged."""
    return Path(path.rstrip("/")).name or path if is_local(path) else path


def is_local(text: str) -> bool:
    """Whether a text is a local path, not a Hub id."""
    if not text or "\0" in text or len(text) > 4096:
        return False
    if text.startswith(("{", "[")):  # YAML: its paths are shortened singly
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
    return _INNER_PATH.sub(lambda match: name_of(match[0]), word)
