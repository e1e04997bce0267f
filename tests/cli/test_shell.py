import subprocess

import pytest

from mlx_dora.cli._shell import quote
from mlx_dora.errors import printable


@pytest.mark.parametrize(
    "word",
    ["plain", "a b", "it's", "~", "$HOME", "a\nb'c\\d", "\x1b[2J", "\x9bé\u202e"],
)
def test_the_shell_reads_back_the_word(word: str) -> None:
    quoted = quote(word)
    assert printable(quoted) == quoted
    shown = subprocess.run(
        ["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True
    )
    assert shown.stdout.decode("utf-8") == word
