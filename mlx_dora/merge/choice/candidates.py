"""The merges that a choice tries: methods with their settings."""

from dataclasses import dataclass, replace
from typing import Any

from mlx_dora.merge.adapters.dense import Options
from mlx_dora.merge.methods import METHODS, method_named

TILT = 1.5
"""Factor on the weight of an adapter whose task gains least."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A merge method with its settings.

    Attributes:
        method: Name of the method.
        weights: One weight per adapter; None if the method takes none.
        density: Fraction of the changes to keep; None if the method drops none.
        space: Space to merge in; None for the method's own.
    """

    method: str
    weights: tuple[float, ...] | None = None
    density: float | None = None
    space: str | None = None

    @property
    def name(self) -> str:
        """The method with its settings: ``ties, weights 0.5,0.5, density 0.2``."""
        parts = [self.method]
        if self.weights is not None:
            parts.append(f"weights {','.join(f'{w:.3g}' for w in self.weights)}")
        if self.density is not None:
            parts.append(f"density {self.density:g}")
        if self.space is not None:
            parts.append(f"space {self.space}")
        return ", ".join(parts)

    def tilted(self, place: int) -> "Candidate":
        """Return the candidate with a larger share for one adapter, same total."""
        assert self.weights is not None
        raised = [w * (TILT if i == place else 1) for i, w in enumerate(self.weights)]
        back = sum(self.weights) / sum(raised)
        return replace(self, weights=tuple(round(w * back, 4) for w in raised))

    def options(self, seed: int) -> Options:
        """Return the settings besides the weights; the seed is for random methods."""
        uses = method_named(self.method).uses
        return Options(
            density=self.density,
            seed=seed if "seed" in uses else 0,
            space=self.space,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "method": self.method,
            "weights": None if self.weights is None else list(self.weights),
            "density": self.density,
            "space": self.space,
        }


def default_candidates(count: int) -> list[Candidate]:
    """Return the merges of `count` adapters to try, the simplest first.

    Changes are added with weights of a total of 1 (a mean), √N, N^¾ and N: N
    independent changes of equal size, added with a total of √N, are together as large
    as one of them. All but ``ties`` without a space build no dense weight.
    ``docs/merging.md`` has the benchmark behind the list.
    """
    mean, root, more, whole = (
        (round(count**power / count, 4),) * count for power in (0, 0.5, 0.75, 1)
    )
    wanted = [
        Candidate(method="slerp" if count == 2 else "karcher", weights=mean),
        Candidate(method="magnitude_weighted", weights=mean),
        Candidate(method="task_arithmetic", weights=root),
        Candidate(method="task_arithmetic", weights=whole),
        Candidate(method="tsv", weights=root, space="core"),
        Candidate(method="tsv", weights=more, space="core"),
        Candidate(method="tsv", weights=whole, space="core"),
        Candidate(method="ties", weights=mean, density=0.2, space="core"),
        Candidate(method="ties", weights=mean, density=0.5, space="core"),
        Candidate(method="ties", weights=mean, density=0.5),
    ]
    return [candidate for candidate in wanted if _merges(candidate, count)]


def _merges(candidate: Candidate, count: int) -> bool:
    fewest, most = METHODS[candidate.method].inputs
    return fewest <= count and (most is None or count <= most)
