"""Former names of what is in `mlx_dora.matrix`, until the last user has moved."""

from mlx_dora.matrix.weight import Weight, matrices, row_blocks, row_squares, stacked

__all__ = ["Weight", "matrices", "row_blocks", "row_squares", "stacked"]
