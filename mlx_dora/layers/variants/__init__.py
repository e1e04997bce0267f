"""Other parametrizations of an adapted linear layer, one per file.

Each is trained in its own form and exported exactly to a plain DoRA layer
(`docs/variants.md`).
"""

from mlx_dora.layers.variants.parametrisation import Parametrisation, VariantLinear
from mlx_dora.layers.variants.weight_norm import WeightNormLinear

__all__ = ["Parametrisation", "VariantLinear", "WeightNormLinear"]
