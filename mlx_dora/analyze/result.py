"""The result of an analysis of one adaptation, and its JSON form."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mlx_dora.analyze.guidance import (
    Advice,
    adaptation_advice,
    radial_share,
    rank_pattern,
)
from mlx_dora.analyze.metrics import (
    MatrixAnalysis,
    correlate_matrices,
    correlation_dict,
)
from mlx_dora.analyze.statistics import Correlation
from mlx_dora.notebook import Shown

SCHEMA = "mlx_dora.analysis"
VERSION = 1


@dataclass(frozen=True, kw_only=True, repr=False)
class AdaptationAnalysis(Shown):
    """Changes made by fine-tuning, matrix by matrix in natural order.

    Attributes:
        layers: One entry per matrix that counts in all results.
        source: Readable name of the analyzed model or adapter.
        base: Readable name of the base.
        unchanged: Names of the matrices that are equal in both models. They count in
            no result.
    """

    layers: list[MatrixAnalysis]
    source: str = ""
    base: str = ""
    unchanged: list[str] = field(default_factory=list)

    kind = "models"

    @cached_property
    def association(self) -> Correlation:
        """Correlation of ΔM and ΔD over matrices."""
        return correlate_matrices(self.layers)

    @property
    def correlation(self) -> float:
        """Pearson correlation of ΔM and ΔD over matrices; NaN if either is constant."""
        return self.association.pearson

    @property
    def classification(self) -> dict[str, str]:
        """Class of each matrix's change; see `metrics.classify_rows`."""
        return {layer.name: layer.classification for layer in self.layers}

    @property
    def radial_share(self) -> float | None:
        """Magnitude's mean share of the squared change; see `guidance.radial_share`."""
        return radial_share(self.layers)

    @property
    def guidance(self) -> list[Advice]:
        """Suggestions for merging, each with its reason."""
        return adaptation_advice(self.layers)

    def rank_pattern(self, budget: float) -> dict[str, int]:
        """Return ranks for a mean rank per matrix; see `guidance.rank_pattern`."""
        return rank_pattern(self.layers, budget)

    def facts(self) -> dict[str, Any]:
        """Return the names, the number of matrices and the correlation."""
        return {
            "source": self.source,
            "base": self.base,
            "matrices": len(self.layers),
            "correlation": self.correlation,
        }

    def table(self) -> list[dict[str, Any]]:
        """Return the matrices, largest ΔD first."""
        return [
            {
                "matrix": layer.name,
                "ΔM": layer.delta_m,
                "ΔM relative": layer.delta_m_relative,
                "ΔD": layer.delta_d,
                "effective rank": layer.effective_rank,
                "kind": layer.classification,
            }
            for layer in sorted(self.layers, key=lambda layer: -layer.delta_d)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the versioned JSON form; see ``docs/analysis.md``."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "kind": self.kind,
            "source": self.source,
            "base": self.base,
            "correlation": correlation_dict(self.association),
            "radial_share": self.radial_share,
            "unchanged": self.unchanged,
            "layers": [layer.to_dict() for layer in self.layers],
            "guidance": [advice.to_dict() for advice in self.guidance],
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class AdapterAnalysis(AdaptationAnalysis):
    """Changes an adapter makes to its base, matrix by matrix in natural order."""

    kind = "adapter"
