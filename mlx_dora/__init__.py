"""DoRA (weight-decomposed low-rank adaptation, arXiv:2402.09353) for MLX.

Importing it loads OpenBLAS where MLX computes on a Linux CPU (`mlx_dora.openblas`), so
import it before mlx there. The public names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_dora.openblas import preload

if TYPE_CHECKING:
    from mlx_dora.adapters.config import DoRAConfig
    from mlx_dora.adapters.files import Adapter, load_adapter, save_adapter
    from mlx_dora.adapters.hosting import load, use_in_mlx_lm
    from mlx_dora.adapters.named import NamedAdapters
    from mlx_dora.adapters.surgery import apply_dora, disabled, remove_dora
    from mlx_dora.decomposition import dora_decompose, dora_merge
    from mlx_dora.errors import DoRAError
    from mlx_dora.fuse.model import fuse_dora
    from mlx_dora.layers import (
        DoRAEmbedding,
        DoRALinear,
        DoRAMultiLinear,
        DoRASwitchLinear,
    )
    from mlx_dora.peft import from_peft, to_peft

preload()

__version__ = "0.2.0"

_HOME = {
    "Adapter": "mlx_dora.adapters.files",
    "DoRAConfig": "mlx_dora.adapters.config",
    "DoRAEmbedding": "mlx_dora.layers",
    "DoRAError": "mlx_dora.errors",
    "DoRALinear": "mlx_dora.layers",
    "DoRAMultiLinear": "mlx_dora.layers",
    "DoRASwitchLinear": "mlx_dora.layers",
    "NamedAdapters": "mlx_dora.adapters.named",
    "apply_dora": "mlx_dora.adapters.surgery",
    "disabled": "mlx_dora.adapters.surgery",
    "dora_decompose": "mlx_dora.decomposition",
    "dora_merge": "mlx_dora.decomposition",
    "from_peft": "mlx_dora.peft",
    "fuse_dora": "mlx_dora.fuse.model",
    "load": "mlx_dora.adapters.hosting",
    "load_adapter": "mlx_dora.adapters.files",
    "remove_dora": "mlx_dora.adapters.surgery",
    "save_adapter": "mlx_dora.adapters.files",
    "to_peft": "mlx_dora.peft",
    "use_in_mlx_lm": "mlx_dora.adapters.hosting",
}

__all__ = [
    "Adapter",
    "DoRAConfig",
    "DoRAEmbedding",
    "DoRAError",
    "DoRALinear",
    "DoRAMultiLinear",
    "DoRASwitchLinear",
    "NamedAdapters",
    "apply_dora",
    "disabled",
    "dora_decompose",
    "dora_merge",
    "from_peft",
    "fuse_dora",
    "load",
    "load_adapter",
    "remove_dora",
    "save_adapter",
    "to_peft",
    "use_in_mlx_lm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_dora' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
