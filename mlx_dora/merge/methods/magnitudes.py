"""The table of rules for the magnitudes of merged adapters.

To add a rule, write one function in `mlx_dora.merge.methods.lengths` and add one entry.
Entries name their functions, which are imported on use.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods.method import function_at


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule for merged magnitudes.

    Attributes:
        name: Name for users.
        summary: What a merged magnitude is, for the documentation.
        lengths: ``module:function`` in `mlx_dora.merge.methods`.
        parameters: Names of the shared settings that it uses.
        of_result: Whether it takes the lengths of the final direction, after a cut.
    """

    name: str
    summary: str
    lengths: str
    parameters: tuple[str, ...] = ()
    of_result: bool = False

    @cached_property
    def function(self) -> Any:
        """The function of the lengths and the density."""
        return function_at(self.lengths)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            name="mean",
            summary="‖W0‖ plus the weighted mean of the changes",
            lengths="lengths:mean",
        ),
        Rule(
            name="mover",
            summary="that of the adapter that moved the row's length furthest",
            lengths="lengths:mover",
        ),
        Rule(
            name="ties",
            summary="‖W0‖ plus TIES of the changes",
            lengths="lengths:ties",
            parameters=("density",),
        ),
        Rule(
            name="base",
            summary="‖W0‖: changes of lengths are dropped",
            lengths="lengths:base",
        ),
        Rule(
            name="own",
            summary="the length of the merged, unnormalized direction, as in LoRA",
            lengths="lengths:own",
            of_result=True,
        ),
    )
}
"""The rules by name, in the order of the documentation."""


def rule_named(name: str) -> Rule:
    """Look up a rule by name.

    Raises:
        DoRAError: If there is no such rule, with all names.
    """
    if name not in RULES:
        raise DoRAError(f"no rule for magnitudes {name!r}: {', '.join(RULES)}.")
    return RULES[name]
