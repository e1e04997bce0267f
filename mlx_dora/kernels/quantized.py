"""Former names of what is in `mlx_dora.matrix`, until the last user has moved."""

from mlx_dora.matrix.packed import QuantizedWeight, unpacks

__all__ = ["QuantizedWeight", "unpacks"]
