"""Analysis of how fine-tuning changed magnitude and direction.

The results are exact and need no dense weight.
"""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.analyze.adapter import analyze_adapter
    from mlx_dora.analyze.compare import compare_adapters
    from mlx_dora.analyze.decomposition import DoRADecomposition
    from mlx_dora.analyze.finetune import analyze_finetune

_HOME = {
    "DoRADecomposition": "mlx_dora.analyze.decomposition",
    "analyze_adapter": "mlx_dora.analyze.adapter",
    "analyze_finetune": "mlx_dora.analyze.finetune",
    "compare_adapters": "mlx_dora.analyze.compare",
}

__all__ = [
    "DoRADecomposition",
    "analyze_adapter",
    "analyze_finetune",
    "compare_adapters",
]

__getattr__, __dir__ = public_names(__name__, _HOME)
