"""What an analysis of one adaptation returns, and its JSON form."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_dora.analyze.guidance import Advice, adaptation_advice, rank_pattern
from mlx_dora.analyze.metrics import (
    MatrixAnalysis,
    correlate_matrices,
    correlation_dict,
)
from mlx_dora.analyze.statistics import Correlation

SCHEMA = "mlx_dora.analysis"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class AdaptationAnalysis:
    """What fine-tuning did, matrix by matrix in natural order.

    Attributes:
        layers: One a matrix.
        source: What was analysed, for people.
        base: What it was compared with, for people.
    """

    layers: list[MatrixAnalysis]
    source: str = ""
    base: str = ""

    kind = "models"

    @cached_property
    def association(self) -> Correlation:
        """ΔM with ΔD over matrices: Pearson, Spearman, interval, n."""
        return correlate_matrices(self.layers)

    @property
    def correlation(self) -> float:
        """Pearson's correlation of ΔM with ΔD over matrices; NaN if one is flat."""
        return self.association.pearson

    @property
    def classification(self) -> dict[str, str]:
        """The kind of change of each matrix; see `metrics.classify_rows`."""
        return {one.name: one.classification for one in self.layers}

    @property
    def guidance(self) -> list[Advice]:
        """What the numbers suggest for merging, each with its reason."""
        return adaptation_advice(self.layers)

    def rank_pattern(self, budget: float) -> dict[str, int]:
        """Ranks for a given mean rank a matrix; see `guidance.rank_pattern`."""
        return rank_pattern(self.layers, budget)

    def to_dict(self) -> dict[str, Any]:
        """The versioned JSON form; see ``docs/analysis.md``."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "kind": self.kind,
            "source": self.source,
            "base": self.base,
            "correlation": correlation_dict(self.association),
            "layers": [one.to_dict() for one in self.layers],
            "guidance": [one.to_dict() for one in self.guidance],
        }


@dataclass(frozen=True, kw_only=True)
class AdapterAnalysis(AdaptationAnalysis):
    """What an adapter does to its base, matrix by matrix in natural order."""

    kind = "adapter"
