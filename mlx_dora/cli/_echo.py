"""Prints text whose control characters cannot affect the terminal."""

import click

from mlx_dora.errors import printable


def echo(line: str, *, err: bool = False, bold: bool = False) -> None:
    """Print a line of text with its control characters escaped.

    Text from files (names, samples, messages) stays on one line.

    Args:
        line: The text, without styles.
        err: Print to stderr.
        bold: Print in bold on a terminal.
    """
    text = printable(line)
    click.echo(click.style(text, bold=True) if bold else text, err=err)
