"""The fused normalize-and-scale steps of DoRA, on arrays.

Each op has a specification in `naive`, a tuned MLX version in `plain` and a kernel in
``metal/``. ``MLX_DORA_KERNELS`` selects among the last two (``metal/README.md``).
"""

from mlx_dora.kernels.adapted_norm import adapted_norm
from mlx_dora.kernels.fused_weight import fused_weight
from mlx_dora.kernels.normalize_rows import normalize_rows
from mlx_dora.kernels.rescale import dora_scale
from mlx_dora.matrix.packed import QuantizedWeight

__all__ = [
    "QuantizedWeight",
    "adapted_norm",
    "dora_scale",
    "fused_weight",
    "normalize_rows",
]
