"""Other parametrisations of an adapted linear layer, one file each.

All of them are trained as they are and exported to a plain DoRA layer, exactly
(`docs/variants.md`).
"""

from mlx_dora.layers.variants.parametrisation import Parametrisation, VariantLinear
from mlx_dora.layers.variants.weight_norm import WeightNormLinear

__all__ = ["Parametrisation", "VariantLinear", "WeightNormLinear"]
