"""The table of calibrations: changes of the updates before any method merges them.

To add a calibration, write one function of the updates (`mlx_dora.matrix.Factors`) and
add one entry. Entries name their functions, which are imported on use.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods.method import function_at


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A calibration of the updates of one matrix.

    Attributes:
        name: Name for users.
        summary: What it does, for the documentation.
        paper: Reference.
        updates: ``module:function`` in `mlx_dora.merge.methods`.
    """

    name: str
    summary: str
    paper: str
    updates: str

    @cached_property
    def function(self) -> Any:
        """The function of the updates that returns the calibrated ones."""
        return function_at(self.updates)


CALIBRATIONS: dict[str, Calibration] = {
    entry.name: entry
    for entry in (
        Calibration(
            name="pico",
            summary="shrink the output directions that all B's share, and restore the "
            "size of the merged update",
            paper="arXiv:2604.16826",
            updates="pico:pico",
        ),
    )
}
"""The calibrations by name."""


def calibration_named(name: str) -> Calibration:
    """Look up a calibration by name.

    Raises:
        DoRAError: If there is no such calibration, with all names.
    """
    if name not in CALIBRATIONS:
        raise DoRAError(f"no calibration {name!r}: {', '.join(CALIBRATIONS)}.")
    return CALIBRATIONS[name]
