"""Merges adapters and models by magnitude and direction; extracts adapters.

Public names are loaded on first use, so that the command line can read the options'
defaults without importing MLX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_dora.merge.adapters.merge import merge_adapters
    from mlx_dora.merge.fisher.estimate import estimate_fisher
    from mlx_dora.merge.models.merge import merge_models

_HOME = {
    "estimate_fisher": "mlx_dora.merge.fisher.estimate",
    "merge_adapters": "mlx_dora.merge.adapters.merge",
    "merge_models": "mlx_dora.merge.models.merge",
}

__all__ = ["estimate_fisher", "merge_adapters", "merge_models"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_dora.merge' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
