"""Measures of a matrix from the changes of its rows (DoRA, section 3.2)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_dora.adapters.keys import is_index
from mlx_dora.analyze.spectrum import effective_rank, rank_holding
from mlx_dora.analyze.statistics import Correlation, correlate, pearson
from mlx_dora.matrix import RowGeometry

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
CLASSES = ("amplified", "attenuated", "rotated", "mixed", "minimal")

MINIMAL = 1e-3
"""Relative Δm and angle below which a row counts as unchanged."""
DOMINANT = 2.0
"""Ratio of relative Δm and angle at which the larger determines a row's class."""


@dataclass(frozen=True, kw_only=True)
class MatrixAnalysis:
    """Analysis of one matrix.

    Attributes:
        name: Full path of the module, or name of the tensor without ``.weight``. The
            name of an expert or a head of latent attention ends in its index:
            ``path[3]``.
        rows: Number of output rows.
        delta_m: ΔM of section 3.2, the mean of |Δm| over rows.
        delta_m_relative: Mean of |Δm|/‖W0‖ over the nonzero rows.
        delta_d: ΔD of section 3.2, the mean of 1 − cos(angle) over rows.
        row_base_norm: ‖W0‖ of each row. Shape ``(rows,)``.
        row_delta_m: Δm of each row, signed. Shape ``(rows,)``.
        row_angle: Angle of each row in radians. Shape ``(rows,)``.
        singular_values: Singular values of the update, largest first.
        rank: Rank of the adapter; None when two checkpoints are compared.
        recomputed: Number of rows computed densely because factored sums cancel.
    """

    name: str
    rows: int
    delta_m: float
    delta_m_relative: float
    delta_d: float
    row_base_norm: np.ndarray = field(repr=False)
    row_delta_m: np.ndarray = field(repr=False)
    row_angle: np.ndarray = field(repr=False)
    singular_values: np.ndarray = field(repr=False)
    rank: int | None = None
    recomputed: int = 0

    @property
    def correlation(self) -> float:
        """Pearson correlation of Δm and angle over rows; NaN if either is constant."""
        return pearson(self.row_delta_m, self.row_angle)

    @property
    def layer(self) -> int | None:
        """Index of the matrix's block; None outside blocks."""
        numbers = [int(part) for part in self.name.split(".") if is_index(part)]
        return numbers[0] if numbers else None

    @property
    def path(self) -> str:
        """The name without the index of an expert."""
        return self.name.partition("[")[0]

    @property
    def module(self) -> str:
        """Type of the module: the last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def row_delta_m_relative(self) -> np.ndarray:
        """Δm/‖W0‖ of each row; 0 where the base row is zero."""
        base = self.row_base_norm
        return np.divide(
            self.row_delta_m, base, out=np.zeros_like(base), where=base > 0
        )

    @property
    def radial_share(self) -> float:
        """Share of ‖W' − W0‖² due to magnitude; the rest is due to direction.

        ‖W'_j − W0_j‖² = Δm² + 4‖W0‖·(‖W0‖ + Δm)·sin²(angle/2), exactly.
        """
        radial = np.square(self.row_delta_m).sum()
        after = self.row_base_norm + self.row_delta_m
        turned = np.square(np.sin(self.row_angle / 2))
        total = radial + (4 * self.row_base_norm * after * turned).sum()
        return float(radial / total) if total > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the update's energy over its directions."""
        return effective_rank(self.singular_values)

    def rank_holding(self, share: float) -> int:
        """Return the least number of directions that hold this share of the energy."""
        return rank_holding(self.singular_values, share)

    def correlate(self) -> Correlation:
        """Return Pearson and Spearman correlation of Δm and angle, with an interval."""
        return correlate(self.row_delta_m, self.row_angle)

    @property
    def row_classes(self) -> dict[str, int]:
        """Number of rows of each class; see `classify_rows`."""
        counts = Counter(classify_rows(self.row_delta_m_relative, self.row_angle))
        return {name: counts.get(name, 0) for name in CLASSES}

    @property
    def classification(self) -> str:
        """The most frequent class of the rows."""
        counts = self.row_classes
        return max(CLASSES, key=lambda name: counts[name])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with distributions as quantiles."""
        return {
            "name": self.name,
            "layer": self.layer,
            "module": self.module,
            "rows": self.rows,
            "delta_m": self.delta_m,
            "delta_m_relative": self.delta_m_relative,
            "delta_d": self.delta_d,
            "correlation": number(self.correlation),
            "radial_share": self.radial_share,
            "mean_angle": float(self.row_angle.mean()),
            "rank": self.rank,
            "effective_rank": self.effective_rank,
            "singular_values": [float(v) for v in self.singular_values[:64]],
            "classification": self.classification,
            "row_classes": self.row_classes,
            "recomputed_rows": self.recomputed,
            "quantiles": {
                "at": list(QUANTILES),
                "delta_m_relative": _quantiles(self.row_delta_m_relative),
                "angle": _quantiles(self.row_angle),
            },
        }


def measure(
    name: str,
    geometry: RowGeometry,
    singular_values: np.ndarray,
    *,
    rank: int | None = None,
) -> MatrixAnalysis:
    """Return a matrix's measures from its rows and its update's singular values."""
    base = geometry.base_norm
    lengths = np.abs(geometry.delta_m)[base > 0] / base[base > 0]
    return MatrixAnalysis(
        name=name,
        rows=base.size,
        delta_m=geometry.mean_delta_m,
        delta_m_relative=float(lengths.mean()) if lengths.size else 0.0,
        delta_d=geometry.mean_delta_d,
        row_base_norm=base,
        row_delta_m=geometry.delta_m,
        row_angle=geometry.angle,
        singular_values=singular_values,
        rank=rank,
        recomputed=geometry.recomputed,
    )


def classify_rows(delta_m_relative: np.ndarray, angle: np.ndarray) -> list[str]:
    """Return the class of each row.

    A row is ``minimal`` if relative Δm and angle are below `MINIMAL`. It is
    ``amplified`` or ``attenuated`` if |Δm|/‖W0‖ is at least `DOMINANT` times the angle
    (to first order, these are the two components of the row's displacement). It is
    ``rotated`` if the angle is at least `DOMINANT` times |Δm|/‖W0‖, and ``mixed``
    otherwise.
    """
    size = np.abs(delta_m_relative)
    kinds = np.select(
        [
            (size < MINIMAL) & (angle < MINIMAL),
            (size >= DOMINANT * angle) & (delta_m_relative > 0),
            (size >= DOMINANT * angle) & (delta_m_relative < 0),
            angle >= DOMINANT * size,
        ],
        ["minimal", "amplified", "attenuated", "rotated"],
        "mixed",
    )
    return kinds.tolist()


def correlate_matrices(layers: Sequence[MatrixAnalysis]) -> Correlation:
    """Correlate ΔM with ΔD over matrices, as in figure 2 of the paper."""
    return correlate(
        np.array([layer.delta_m for layer in layers]),
        np.array([layer.delta_d for layer in layers]),
    )


def number(value: float) -> float | None:
    """Return a value that JSON can hold: None if it is not finite."""
    return float(value) if np.isfinite(value) else None


def correlation_dict(correlation: Correlation) -> dict[str, Any]:
    """Return a correlation as JSON values."""
    return {
        "pearson": number(correlation.pearson),
        "spearman": number(correlation.spearman),
        "interval": [number(v) for v in correlation.interval],
        "n": correlation.n,
    }


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.quantile(values, QUANTILES)]
