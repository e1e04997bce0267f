"""Prints the report of a work that wrote a folder."""

from typing import Protocol

from mlx_dora.cli._echo import detail, echo


class Report(Protocol):
    """A report in two degrees of detail."""

    def lines(self) -> list[str]:
        """Return the summary."""
        ...

    def details(self) -> list[str]:
        """Return a line for each matrix."""
        ...


def show_report(report: Report, save_path: str) -> None:
    """Print the summary, and with ``--verbose`` first the details."""
    for line in report.details():
        detail(line)
    for line in report.lines():
        echo(line)
    echo(f"Saved to {save_path}")
