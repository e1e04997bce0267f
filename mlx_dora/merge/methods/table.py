"""The table of merge methods.

To add a method, write one function and add one entry here. A function of rows
(`methods.rows`) merges models, and adapters exactly without a dense weight. A function
of blocks (`methods.elementwise`) merges models, and adapters through a dense matrix.
Entries name their functions, which are imported on use.
"""

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods.method import Mergekit, MergeMethod

_SUM = ("normalize", "lambda")
_CUT = (*_SUM, "density")
_DARE = (*_CUT, "rescale")
_ALL = {"density": 1.0}  # what mergekit keeps by default

METHODS: dict[str, MergeMethod] = {
    entry.name: entry
    for entry in (
        MergeMethod(
            name="slerp",
            summary="the great circle from u_1 to u_2",
            paper="Shoemake 1985",
            rows="rows:slerp",
            whole="rows:slerp_vectors",
            inputs=(2, 2),
            base="optional",
            is_mean=True,
            mergekit=[Mergekit("slerp", "t", inputs=(2, 2), starts_at_base=True)],
        ),
        MergeMethod(
            name="nuslerp",
            summary="the unnormalized rows, interpolated along their great circle",
            paper="mergekit",
            rows="rows:nuslerp",
            inputs=(2, 2),
            base="optional",
            is_mean=True,
            vectors="row",
            mergekit=[
                Mergekit(
                    "nuslerp",
                    uses_base=True,
                    row_when=("nuslerp_flatten", False),
                    only={"nuslerp_row_wise": False},
                )
            ],
        ),
        MergeMethod(
            name="karcher",
            summary="the point with the least squared arc length to all",
            paper="arXiv:2603.04972",
            rows="rows:karcher",
            base="optional",
            is_mean=True,
            mergekit=[Mergekit("karcher", "equal")],
        ),
        MergeMethod(
            name="nmean",
            summary="Σ w_i u_i, scaled to unit length",
            rows="rows:nmean",
            base="optional",
            is_mean=True,
        ),
        MergeMethod(
            name="magnitude_weighted",
            summary="`nmean`, rows weighted by how far each input moved its length",
            rows="rows:magnitude_weighted",
            base="lengths",
            is_mean=True,
            by_row_only=True,
        ),
        MergeMethod(
            name="linear",
            summary="Σ w_i W_i, with its own length",
            paper="arXiv:2203.05482",
            rows="rows:linear",
            blocks="elementwise:linear",
            is_mean=True,
            parameters=("normalize",),
            mergekit=[
                Mergekit("linear", parameters=("normalize",)),
                Mergekit(
                    "passthrough",
                    parameters=("scale",),
                    defaults={"weight": 1.0, "normalize": False},
                    renamed={"scale": "weight"},
                    inputs=(1, 1),
                ),
            ],
        ),
        MergeMethod(
            name="task_arithmetic",
            summary="W0 + λ Σ w_i (W_i − W0), with its own length",
            paper="arXiv:2212.04089",
            rows="rows:linear",
            blocks="elementwise:task_arithmetic",
            base="changes",
            parameters=_SUM,
            mergekit=[Mergekit("task_arithmetic", parameters=_SUM)],
        ),
        MergeMethod(
            name="model_stock",
            summary="W0 + t times the mean change; t from the angles of the changes",
            paper="arXiv:2403.19522",
            rows="rows:model_stock",
            inputs=(2, None),
            base="changes",
            vectors="row",
            takes_weights=False,
            mergekit=[Mergekit("model_stock", "equal", row_when=("filter_wise", True))],
        ),
        MergeMethod(
            name="fisher",
            summary="mean of rows, or elements, weighted by their Fisher information",
            paper="arXiv:2111.09832",
            rows="rows:linear",
            is_mean=True,
            by_row_only=True,
            needs_fisher=True,
        ),
        MergeMethod(
            name="ties",
            summary="mean of the largest changes that have the elected sign",
            paper="arXiv:2306.01708",
            blocks="elementwise:ties",
            base="changes",
            parameters=_CUT,
            density=0.2,
            mergekit=[Mergekit("ties", parameters=_CUT, defaults=_ALL)],
        ),
        MergeMethod(
            name="dare",
            summary="changes dropped at random, the rest rescaled",
            paper="arXiv:2311.03099",
            blocks="elementwise:dare",
            base="changes",
            parameters=(*_DARE, "seed"),
            density=0.5,
            mergekit=[Mergekit("dare_linear", parameters=_DARE, defaults=_ALL)],
        ),
        MergeMethod(
            name="dare_ties",
            summary="changes dropped at random, then the elected sign as in `ties`",
            paper="arXiv:2311.03099",
            blocks="elementwise:dare_ties",
            base="changes",
            parameters=(*_DARE, "seed"),
            density=0.5,
            mergekit=[
                Mergekit(
                    "dare_ties",
                    parameters=_DARE,
                    defaults={**_ALL, "normalize": False},
                )
            ],
        ),
        MergeMethod(
            name="tsv",
            summary="orthogonal task singular vectors",
            paper="arXiv:2412.00081",
            blocks="elementwise:tsv",
            base="changes",
            parameters=("lambda",),
        ),
    )
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


def names_with(parameter: str) -> str:
    """Names of the methods that use a setting, for a help text."""
    return ", ".join(n for n, entry in METHODS.items() if parameter in entry.parameters)
