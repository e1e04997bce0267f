"""Adapters in a model or on disk: configuration, attaching, files and fusing."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.adapters.adapter import Adapter
    from mlx_dora.adapters.config import DoRAConfig
    from mlx_dora.adapters.files import load_adapter, save_adapter
    from mlx_dora.adapters.hosting import load, use_in_mlx_lm
    from mlx_dora.adapters.named import NamedAdapters
    from mlx_dora.adapters.surgery import apply_dora, disabled, remove_dora

_HOME = {
    "Adapter": "mlx_dora.adapters.adapter",
    "DoRAConfig": "mlx_dora.adapters.config",
    "NamedAdapters": "mlx_dora.adapters.named",
    "apply_dora": "mlx_dora.adapters.surgery",
    "disabled": "mlx_dora.adapters.surgery",
    "load": "mlx_dora.adapters.hosting",
    "load_adapter": "mlx_dora.adapters.files",
    "remove_dora": "mlx_dora.adapters.surgery",
    "save_adapter": "mlx_dora.adapters.files",
    "use_in_mlx_lm": "mlx_dora.adapters.hosting",
}

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

__getattr__, __dir__ = public_names(__name__, _HOME)
