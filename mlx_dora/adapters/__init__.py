"""Adapters in a model or on disk: configuration, attaching, files and fusing."""

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load, use_in_mlx_lm
from mlx_dora.adapters.named import NamedAdapters
from mlx_dora.adapters.surgery import apply_dora, disabled, remove_dora

__all__ = [
    "Adapter",
    "DoRAConfig",
    "NamedAdapters",
    "apply_dora",
    "disabled",
    "load",
    "load_adapter",
    "remove_dora",
    "save_adapter",
    "use_in_mlx_lm",
]
