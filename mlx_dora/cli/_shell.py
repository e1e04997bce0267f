"""Words of a command line that is printed for the user to run."""

import shlex

from mlx_dora.errors import printable


def quote(word: str) -> str:
    r"""Quote a word for the shell, in characters that a terminal shows as they are.

    A word with a line end or another control character becomes ``$'a\nb'``, which
    bash and zsh read.
    """
    if printable(word) == word:
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(escaped)}'"
