"""One adapted matrix as values with methods: what the rest of the package stands on.

`weight` reads W0, dense or packed; `low_rank` holds s·BA; `terms` has DoRA's equations
on their inner products; `geometry`, `grams` and `blend` follow from these.
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
