"""Values and equations of an adapted matrix, the foundation of the package.

`weight` reads W0, dense or packed. `low_rank` holds the update s·BA. `terms` has DoRA's
equations on their inner products. `geometry`, `grams` and `blend` build on these.
"""

from mlx_dora.matrix.blend import Measured, blend, measured
from mlx_dora.matrix.geometry import RowGeometry, pair_geometry, row_geometry
from mlx_dora.matrix.grams import RowGrams, row_grams
from mlx_dora.matrix.low_rank import Adapted, Factors, LowRank, Spectrum
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.terms import ExactTerms, Terms, exact_terms, row_gain
from mlx_dora.matrix.weight import Weight

__all__ = [
    "Adapted",
    "ExactTerms",
    "Factors",
    "LowRank",
    "Measured",
    "QuantizedWeight",
    "RowGeometry",
    "RowGrams",
    "Spectrum",
    "Terms",
    "Weight",
    "blend",
    "exact_terms",
    "measured",
    "pair_geometry",
    "row_gain",
    "row_geometry",
    "row_grams",
]
