"""Entries of the methods that work on blocks of dense tensors."""

from mlx_dora.merge.methods.method import Mergekit, MergeMethod, Parameter

_KEPT = ("normalize", "lambda", "density", "rescale")
_ALL = {"density": 1.0}  # what mergekit keeps by default
_GAMMA = Parameter(
    name="gamma",
    help="fraction of the largest entries to drop",
    default=0.01,
    most=1.0,
    per_input=True,
)
_EPSILON = Parameter(
    name="epsilon",
    help="how far probabilities go below and above the density",
    default=0.15,
    most=0.5,
    per_input=True,
)

BLOCK_ENTRIES = (
    MergeMethod(
        name="ties",
        summary="mean of the largest changes that have the elected sign",
        paper="arXiv:2306.01708",
        blocks="sparse:ties",
        base="changes",
        parameters=_KEPT,
        density=0.2,
        mergekit=[Mergekit("ties", parameters=_KEPT, defaults=_ALL)],
    ),
    MergeMethod(
        name="dare",
        summary="changes dropped at random, the rest rescaled",
        paper="arXiv:2311.03099",
        blocks="sparse:dare",
        base="changes",
        parameters=(*_KEPT, "seed"),
        density=0.5,
        mergekit=[Mergekit("dare_linear", parameters=_KEPT, defaults=_ALL)],
    ),
    MergeMethod(
        name="dare_ties",
        summary="changes dropped at random, then the elected sign as in `ties`",
        paper="arXiv:2311.03099",
        blocks="sparse:dare_ties",
        base="changes",
        parameters=(*_KEPT, "seed"),
        density=0.5,
        mergekit=[
            Mergekit(
                "dare_ties",
                parameters=_KEPT,
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
    MergeMethod(
        name="iso",
        summary="the sum of the changes, all singular values set to their mean",
        paper="arXiv:2502.04959",
        blocks="spectral:iso",
        base="changes",
        parameters=("lambda",),
        space="core",
    ),
    MergeMethod(
        name="breadcrumbs",
        summary="changes without the largest and the smallest entries",
        paper="arXiv:2312.06795",
        blocks="sparse:breadcrumbs",
        base="changes",
        parameters=_KEPT,
        own=(_GAMMA,),
        density=0.9,
        mergekit=[Mergekit("breadcrumbs", parameters=(*_KEPT, "gamma"), defaults=_ALL)],
    ),
    MergeMethod(
        name="breadcrumbs_ties",
        summary="`breadcrumbs`, then the elected sign as in `ties`",
        paper="arXiv:2312.06795",
        blocks="sparse:breadcrumbs_ties",
        base="changes",
        parameters=_KEPT,
        own=(_GAMMA,),
        density=0.9,
        mergekit=[
            Mergekit("breadcrumbs_ties", parameters=(*_KEPT, "gamma"), defaults=_ALL)
        ],
    ),
    MergeMethod(
        name="della",
        summary="changes dropped at random, small ones more often, then as in `ties`",
        paper="arXiv:2406.11617",
        blocks="sparse:della",
        base="changes",
        parameters=(*_KEPT, "seed"),
        own=(_EPSILON,),
        density=0.5,
        mergekit=[Mergekit("della", parameters=(*_KEPT, "epsilon"), defaults=_ALL)],
    ),
    MergeMethod(
        name="della_linear",
        summary="changes dropped at random, small ones more often, then summed",
        paper="arXiv:2406.11617",
        blocks="sparse:della_linear",
        base="changes",
        parameters=(*_KEPT, "seed"),
        own=(_EPSILON,),
        density=0.5,
        mergekit=[
            Mergekit("della_linear", parameters=(*_KEPT, "epsilon"), defaults=_ALL)
        ],
    ),
    MergeMethod(
        name="sce",
        summary="mean of the most varied changes, weighted by their squares",
        paper="arXiv:2408.07990",
        blocks="importance:sce",
        base="changes",
        own=(
            Parameter(
                name="select_topk",
                help="share of the elements to select, by how much the inputs vary",
                default=1.0,
                most=1.0,
            ),
        ),
        takes_weights=False,
        mergekit=[Mergekit("sce", "equal", parameters=("select_topk",))],
    ),
    MergeMethod(
        name="nearswap",
        summary="W0 plus the change, of at most t",
        paper="mergekit",
        blocks="importance:nearswap",
        inputs=(1, 1),
        base="changes",
        own=(Parameter(name="t", help="largest change of an entry"),),
        takes_weights=False,
        mergekit=[Mergekit("nearswap", "equal", parameters=("t",))],
    ),
    MergeMethod(
        name="arcee_fusion",
        summary="W0 plus the changes of outstanding importance",
        paper="mergekit",
        blocks="importance:arcee_fusion",
        inputs=(1, 1),
        base="changes",
        takes_weights=False,
        reads_base=True,
        mergekit=[Mergekit("arcee_fusion", "equal")],
    ),
)
"""They merge models, and adapters in a space."""
