"""Former names of what is in `mlx_dora.matrix`, until the last user has moved."""

from mlx_dora.matrix.grams import RowGrams, row_grams
from mlx_dora.matrix.low_rank import Adapted as AdaptedMatrix
from mlx_dora.matrix.low_rank import LowRank as Update
from mlx_dora.matrix.terms import one_minus_cosine
from mlx_dora.matrix.weight import float32_rows

__all__ = [
    "AdaptedMatrix",
    "RowGrams",
    "Update",
    "float32_rows",
    "one_minus_cosine",
    "row_grams",
]
