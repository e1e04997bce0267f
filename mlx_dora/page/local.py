"""Keeps the folders of this machine out of pages that leave it."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

_INNER_PATH = re.compile(r"(?<![\w:/.])(?:~|/[^/\s'\",=:]+)(?:/[^/\s'\",=:]+)+/?")


def without_folders(words: Sequence[str]) -> str:
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
