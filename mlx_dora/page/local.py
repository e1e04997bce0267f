"""Keeps the folders of this machine out of pages that leave it."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

_INNER_PATH = re.compile(r"(?<![\w:/.])(?:~|/[^/\s'\",=:]+)(?:/[^/\s'\",=:]+)+/?")


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


def without_folders(words: Sequence[str], name: Callable[[str], str] = name_of) -> str:
    """Join a command line, reducing local paths to what `name` returns for them."""
    return shlex.join(_word(word, name) for word in words)


def _word(word: str, name: Callable[[str], str]) -> str:
    # --flag=PATH, or -fPATH
    if match := re.fullmatch(r"(-[^=/~]*=|-[a-zA-Z])(.+)", word, re.DOTALL):
        if is_local(match[2]):
            return match[1] + _word(match[2], name)
    elif is_local(word) and not re.match(r"\w+://", word):
        return name(word)
    return _INNER_PATH.sub(lambda path: name(path[0]), word)
