"""The table of spaces: coordinates in which block methods merge adapters.

To add a space, write one function in `mlx_dora.merge.methods.coordinates` and add one
entry. Entries name their functions, which are imported on use.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods.method import function_at


@dataclass(frozen=True, kw_only=True)
class Space:
    """A space in which adapters are merged.

    Attributes:
        name: Name for users.
        summary: What the coordinates are, for the documentation.
        paper: Reference; empty for the matrix itself.
        coordinates: ``module:function`` in `mlx_dora.merge.methods`; empty for the
            dense matrix.
        needs_rank: Whether the space is chosen for a rank, which must be given.
    """

    name: str
    summary: str
    paper: str = ""
    coordinates: str = ""
    needs_rank: bool = False

    @cached_property
    def function(self) -> Any:
        """The function of the updates and the rank."""
        return function_at(self.coordinates)

    def check_rank(self, rank: int | None) -> None:
        """Refuse a missing rank.

        Raises:
            DoRAError: If the space needs a rank, and there is none.
        """
        if self.needs_rank and rank is None:
            raise DoRAError(
                f"space {self.name} needs the rank of the result, got none: give a "
                "rank."
            )


WEIGHT = "weight"
"""The space of the dense matrix itself."""

SPACES: dict[str, Space] = {
    space.name: space
    for space in (
        Space(name=WEIGHT, summary="the entries of the matrix (out, in)"),
        Space(
            name="core",
            summary="the (Σr, Σr) cores in the bases of the stacked B's and A's",
            paper="arXiv:2509.17786",
            coordinates="coordinates:core",
        ),
        Space(
            name="knots",
            summary="the right factors (Σr, in) of the SVD of all updates side by side",
            paper="arXiv:2410.19735",
            coordinates="coordinates:knots",
        ),
        Space(
            name="ctm",
            summary="(r, r) cores in the best common subspaces of the rank of --rank",
            paper="arXiv:2606.03723",
            coordinates="coordinates:ctm",
            needs_rank=True,
        ),
    )
}
"""The spaces by name, in the order of the documentation."""


def space_named(name: str) -> Space:
    """Look up a space by name.

    Raises:
        DoRAError: If there is no such space, with all names.
    """
    if name not in SPACES:
        raise DoRAError(f"no space {name!r}: {', '.join(SPACES)}.")
    return SPACES[name]
