"""Words of a command line that is printed for the user to run."""

import shlex

from mlx_dora.errors import printable


def quote(word: str) -> str:
    r"""Quote a word for the shell, in characters that a terminal shows as they are.

    A word with a line end or another control character becomes ``$'a\x0ab'``, which
    bash and zsh read.
    """
    if printable(word) == word:
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(map(_escape, escaped))}'"


def _escape(character: str) -> str:
    if printable(character) == character:
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode())
