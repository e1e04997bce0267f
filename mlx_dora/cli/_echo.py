"""The one way to a terminal: what a file brought cannot act on it."""

import click

from mlx_dora.errors import printable


def echo(line: str, *, err: bool = False, bold: bool = False) -> None:
    """Print a line of text, its control characters escaped.

    Names, samples and messages come from files; one line stays one line.

    Args:
        line: The text, without styles.
        err: Print to stderr.
        bold: Print it bold, on a terminal.
    """
    text = printable(line)
    click.echo(click.style(text, bold=True) if bold else text, err=err)
