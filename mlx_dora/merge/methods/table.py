"""The table of merge methods.

To add a method, write one function and add one entry. A function of rows
(`methods.rows`, entry in `row_entries`) merges models, and adapters exactly without a
dense weight. A function of blocks (`methods.elementwise`, `methods.sparse`,
`methods.importance`, `methods.spectral`, entry in `block_entries`) merges models, and
adapters in a space (`methods.spaces`): as a dense matrix, or in coordinates. Entries
name their functions, which are imported on use.
"""

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods.block_entries import BLOCK_ENTRIES
from mlx_dora.merge.methods.method import MergeMethod, Parameter
from mlx_dora.merge.methods.row_entries import ROW_ENTRIES

METHODS: dict[str, MergeMethod] = {
    entry.name: entry for entry in (*ROW_ENTRIES, *BLOCK_ENTRIES)
}
"""The methods by name, in the order of the documentation."""

DEFAULT = "slerp"
"""The default method."""

MERGEKIT = {
    kit.name: (kit, entry) for entry in METHODS.values() for kit in entry.mergekit
}
"""By mergekit's name: its form in YAML, and the method."""


def method_named(name: str) -> MergeMethod:
    """Look up a method by name.

    Raises:
        DoRAError: If there is no such method, with all names.
    """
    if name not in METHODS:
        raise DoRAError(f"no merge method {name!r}: {', '.join(METHODS)}.")
    return METHODS[name]


def densities() -> str:
    """The default densities, for a help text: ``ties 0.2, dare 0.5``."""
    return ", ".join(f"{e.name} {e.density}" for e in METHODS.values() if e.density)


def exact_names() -> str:
    """Names of the methods that merge adapters exactly, for a help text."""
    return ", ".join(name for name, entry in METHODS.items() if entry.is_exact)


def names_in_spaces() -> list[str]:
    """Names of the methods that merge adapters in any space."""
    return [name for name, entry in METHODS.items() if entry.takes_space]


def names_with(parameter: str) -> str:
    """Names of the methods that use a setting, for a help text."""
    return ", ".join(n for n, entry in METHODS.items() if parameter in entry.uses)


def own_parameters() -> dict[str, Parameter]:
    """Parameters that only some methods have, by name."""
    return {p.name: p for entry in METHODS.values() for p in entry.own}
