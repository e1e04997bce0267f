"""The fused normalise-and-scale steps of DoRA, on arrays.

Each op exists in plain MLX in `reference`, which is its specification, and as a kernel
in ``metal/``; ``MLX_DORA_KERNELS`` chooses (``metal/README.md``).
"""

from mlx_dora.kernels.adapted_norm import adapted_norm
from mlx_dora.kernels.dora_scale import dora_scale
from mlx_dora.kernels.fused_weight import fused_weight
from mlx_dora.kernels.normalize_rows import normalize_rows
from mlx_dora.kernels.quantized import QuantizedWeight

__all__ = [
    "QuantizedWeight",
    "adapted_norm",
    "dora_scale",
    "fused_weight",
    "normalize_rows",
]
