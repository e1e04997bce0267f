"""Analysis of how fine-tuning changed magnitude and direction.

The results are exact and need no dense weight.
"""

from mlx_dora.analyze.adapter import analyze_adapter
from mlx_dora.analyze.compare import compare_adapters
from mlx_dora.analyze.decomposition import DoRADecomposition
from mlx_dora.analyze.finetune import analyze_finetune

__all__ = [
    "DoRADecomposition",
    "analyze_adapter",
    "analyze_finetune",
    "compare_adapters",
]
