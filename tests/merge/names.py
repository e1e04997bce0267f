"""Groups of merge methods that tests run over, read from the table."""

from mlx_dora.merge.methods import METHODS

ALL = list(METHODS)
EXACT = [value.name for value in METHODS.values() if value.is_exact]
NORMALIZED = [value.name for value in METHODS.values() if value.is_mean]
MEANS = ["slerp", "karcher", "nmean", "magnitude_weighted"]
SUMS = ["linear", "task_arithmetic"]
FISHER = "fisher"
UNNORMALIZED = [
    "task_arithmetic", "dare", "breadcrumbs", "breadcrumbs_ties", "della_linear",
]  # fmt: skip
"""Sums of changes: N copies with weights 1/N give the copy back."""
RANDOM = [value.name for value in METHODS.values() if "seed" in value.parameters]
CHOOSING = ["arcee_fusion", "iso"]
"""No copy comes back: they take over some entries only, or set singular values."""
SPECTRAL = ["tsv", "iso"]
"""Merge matrices as a whole."""
_LARGE = {"nearswap": {"t": 1e6}}


def needed(method: str, **defaults: float) -> dict[str, float]:
    """Parameters that a method needs; the defaults are those of its own."""
    own = {parameter.name for parameter in METHODS[method].own}
    given = {name: value for name, value in defaults.items() if name in own}
    return {**_LARGE.get(method, {}), **given}


def most(method: str, count: int) -> int:
    """How many of `count` inputs a method merges."""
    return min(count, METHODS[method].inputs[1] or count)
