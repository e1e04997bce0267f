"""The fused normalise-and-scale steps of DoRA, on arrays.

Each op exists in plain MLX in `reference`, which is its specification.
"""

from mlx_dora.kernels.quantized import QuantizedWeight
from mlx_dora.kernels.reference import (
    adapted_norm,
    dora_scale,
    fused_weight,
    normalize_rows,
)

__all__ = [
    "QuantizedWeight",
    "adapted_norm",
    "dora_scale",
    "fused_weight",
    "normalize_rows",
]
