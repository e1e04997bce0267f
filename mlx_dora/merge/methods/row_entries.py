"""Entries of the methods that combine rows (functions in `methods.rows`)."""

from mlx_dora.merge.methods.method import Mergekit, MergeMethod

_SUM = ("normalize", "lambda")

ROW_ENTRIES = (
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
        parameters=("normalize",),
        mergekit=[
            Mergekit(
                "multislerp",
                parameters=("normalize_weights",),
                renamed={"normalize_weights": "normalize"},
                uses_base=True,
            )
        ],
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
)
"""They merge models, and adapters exactly without a dense weight."""
