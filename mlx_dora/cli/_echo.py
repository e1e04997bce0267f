"""Prints text whose control characters cannot affect the terminal."""

import logging
import shlex
import shutil
import sys
import textwrap

import click

from mlx_dora.errors import printable

NOTES = logging.getLogger("mlx_dora.cli")
RESULTS = logging.getLogger("mlx_dora.cli.results")
"""Copies the results to the log file; they reach the terminal by `echo`."""
JSON_ON_STDOUT = "mlx_dora.json_on_stdout"
"""Key of the context's `meta`: stdout is reserved for the JSON of ``--json -``."""


def echo(line: str, *, err: bool = False, bold: bool = False) -> None:
    """Print a line of text with its control characters escaped.

    Text from files (names, samples, messages) stays on one line, unless that line is
    wider than the terminal. Results are not printed beside ``--json -``.

    Args:
        line: The text, without styles.
        err: Print to stderr, in one line.
        bold: Print in bold on a terminal.
    """
    text = printable(line)
    if err:
        click.echo(text, err=True)
        return
    _print(fitted(text, sys.stdout), bold=bold)


def _print(text: str, *, bold: bool = False) -> None:
    RESULTS.info("%s", text)
    context = click.get_current_context(silent=True)
    if context is None or not context.meta.get(JSON_ON_STDOUT):
        click.echo(click.style(text, bold=True) if bold else text)


def show_command(line: str, *, err: bool = False) -> None:
    r"""Print a command line to copy; one that is too wide goes on after a ``\\``."""
    stream = sys.stderr if err else sys.stdout
    width = columns(stream)
    # Without its quotes, a word with a space or with escapes could not be copied.
    words = [line] if "$'" in line else shlex.split(line, posix=False)
    rows = [""]
    for word in words:
        if width and len(rows[-1]) > 4 and len(rows[-1]) + len(word) + 5 > width:
            rows[-1] += " \\"
            rows.append("   ")
        rows[-1] += f" {word}"
    for row in rows:
        click.echo(printable(f" {row}"), err=True) if err else _print(f" {row}")


def note(line: str) -> None:
    """Print a line about the work to stderr, unless ``--quiet`` is given."""
    NOTES.info("%s", line)


def detail(line: str) -> None:
    """Print a line to stderr if ``--verbose`` is given."""
    NOTES.debug("%s", line)


def columns(stream: object) -> int | None:
    """Return the width of a terminal; None for a pipe, which gets whole lines."""
    is_terminal = getattr(stream, "isatty", lambda: False)()
    return shutil.get_terminal_size().columns if is_terminal else None


def fitted(text: str, stream: object) -> str:
    """Break a line that is wider than the terminal between words, if that helps."""
    width = columns(stream)
    if width is None or len(text) <= width:
        return text
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    lines = textwrap.wrap(
        text,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines) if max(map(len, lines)) <= width else text
