"""Per-matrix measures from how each of its rows moved (DoRA, section 3.2)."""

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
"""A row whose relative Δm and angle are both under this has hardly moved."""
DOMINANT = 2.0
"""A row is of one kind where that part is this many times the other."""


@dataclass(frozen=True, kw_only=True)
class MatrixAnalysis:
    """What happened to one matrix.

    Attributes:
        name: Full path of the module, or name of the tensor without ``.weight``; of an
            expert, or a head of latent attention, with its index: ``path[3]``.
        rows: Number of output rows.
        delta_m: ΔM of section 3.2, the mean of the size of Δm over rows.
        delta_m_relative: The mean over rows of the size of Δm/‖W0‖, zero rows left out.
        delta_d: ΔD of section 3.2, the mean over rows of 1 − cos(angle).
        row_base_norm: ‖W0‖ of each row. Shape ``(rows,)``.
        row_delta_m: Δm of each row, signed. Shape ``(rows,)``.
        row_angle: Angle of each row, radians. Shape ``(rows,)``.
        singular_values: Of the update, the largest first.
        rank: Rank the adapter has there; None for two checkpoints.
        recomputed: Rows taken densely because factored sums cancel.
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
        """Pearson's correlation of Δm with the angle over rows; NaN if one is flat."""
        return pearson(self.row_delta_m, self.row_angle)

    @property
    def layer(self) -> int | None:
        """Depth of the block it is in; None outside blocks."""
        numbers = [int(part) for part in self.name.split(".") if is_index(part)]
        return numbers[0] if numbers else None

    @property
    def path(self) -> str:
        """The name without the index of an expert."""
        return self.name.partition("[")[0]

    @property
    def module(self) -> str:
        """Module type: the last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def row_delta_m_relative(self) -> np.ndarray:
        """Δm/‖W0‖ of each row; 0 for a row that was zero."""
        base = self.row_base_norm
        return np.divide(
            self.row_delta_m, base, out=np.zeros_like(base), where=base > 0
        )

    @property
    def radial_share(self) -> float:
        """Share of ‖W' − W0‖² along the rows (magnitude); the rest is direction.

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
        """The fewest directions of the update that hold this share of its energy."""
        return rank_holding(self.singular_values, share)

    def correlate(self) -> Correlation:
        """The correlation of Δm with the angle, with Spearman's and an interval."""
        return correlate(self.row_delta_m, self.row_angle)

    @property
    def row_classes(self) -> dict[str, int]:
        """How many rows are of each kind; see `classify_rows`."""
        counts = Counter(classify_rows(self.row_delta_m_relative, self.row_angle))
        return {name: counts.get(name, 0) for name in CLASSES}

    @property
    def classification(self) -> str:
        """The kind that most rows are of."""
        counts = self.row_classes
        return max(CLASSES, key=lambda name: counts[name])

    def to_dict(self) -> dict[str, Any]:
        """JSON values, distributions as quantiles."""
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
    """The measures of one matrix from its rows and the update's singular values."""
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
    """What became of each row.

    ``minimal`` where relative Δm and angle are under `MINIMAL`; ``amplified`` or
    ``attenuated`` where the size of Δm/‖W0‖ is at least `DOMINANT` times the angle (to
    first order the two sides of the row's displacement); ``rotated`` where the angle is
    that many times the other; ``mixed`` otherwise.
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
    """ΔM against ΔD, a point a matrix, as in the paper's figure 2."""
    return correlate(
        np.array([one.delta_m for one in layers]),
        np.array([one.delta_d for one in layers]),
    )


def number(value: float) -> float | None:
    """A value that JSON can hold: NaN becomes None."""
    return float(value) if np.isfinite(value) else None


def correlation_dict(found: Correlation) -> dict[str, Any]:
    """JSON values of a correlation."""
    return {
        "pearson": number(found.pearson),
        "spearman": number(found.spearman),
        "interval": [number(v) for v in found.interval],
        "n": found.n,
    }


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.quantile(values, QUANTILES)]
