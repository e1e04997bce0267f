"""Former names of what is in `mlx_dora.matrix`, until the last user has moved."""

import mlx.core as mx

from mlx_dora.matrix import geometry
from mlx_dora.matrix.geometry import RowGeometry, blocks_geometry, pair_geometry
from mlx_dora.matrix.low_rank import Adapted, LowRank
from mlx_dora.matrix.weight import Weight

__all__ = ["RowGeometry", "blocks_geometry", "pair_geometry", "row_geometry"]


def row_geometry(
    weight: Weight,
    lora_a: mx.array,
    lora_b: mx.array,
    scale: float,
    m: mx.array | None = None,
) -> RowGeometry:
    """`mlx_dora.matrix.row_geometry` of separate factors."""
    update = LowRank(lora_a=lora_a, lora_b=lora_b, scale=scale)
    return geometry.row_geometry(weight, Adapted(update=update, m=m))
