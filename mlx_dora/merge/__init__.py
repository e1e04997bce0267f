"""Merges adapters and models by magnitude and direction; extracts adapters."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.merge.adapters.merge import merge_adapters
    from mlx_dora.merge.choice.choose import choose_merge
    from mlx_dora.merge.choice.result import MergeChoice
    from mlx_dora.merge.fisher.estimate import estimate_fisher
    from mlx_dora.merge.models.merge import merge_models

_HOME = {
    "MergeChoice": "mlx_dora.merge.choice.result",
    "choose_merge": "mlx_dora.merge.choice.choose",
    "estimate_fisher": "mlx_dora.merge.fisher.estimate",
    "merge_adapters": "mlx_dora.merge.adapters.merge",
    "merge_models": "mlx_dora.merge.models.merge",
}

__all__ = [
    "MergeChoice",
    "choose_merge",
    "estimate_fisher",
    "merge_adapters",
    "merge_models",
]

__getattr__, __dir__ = public_names(__name__, _HOME)
