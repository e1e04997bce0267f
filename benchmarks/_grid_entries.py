"""Adapters, combinations and contenders of `merge_grid.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.merge.adapters.dense import Options
from mlx_dora.merge.adapters.merge import merge_adapters_report
from mlx_dora.merge.methods import METHODS


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained."""

    task: str
    rank: int = 8
    iters: int = 30
    kind: str = "dora"
    seed: int = 0


ADAPTERS = {
    "docs": Recipe("docstrings"),
    "docs-again": Recipe("docstrings", seed=1),
    "spam": Recipe("spam"),
    "spam-lora": Recipe("spam", rank=4, iters=60, kind="lora", seed=1),
    "talk": Recipe("dialogue"),
    "sums": Recipe("sums", rank=16),
    "sums-long": Recipe("sums", rank=4, iters=80, seed=1),
    "records-lora": Recipe("records", rank=32, iters=60, kind="lora", seed=1),
}
COMBINATIONS = (
    ("docs", "spam"),
    ("docs", "sums"),
    ("docs", "spam", "talk"),
    ("docs", "docs-again"),
    ("docs", "docs-again", "spam"),
    ("sums-long", "talk"),
    ("docs", "records-lora"),
    ("spam", "talk"),
    ("docs", "spam", "sums", "records-lora"),
    ("spam-lora", "records-lora"),
    ("talk", "records-lora", "sums"),
    ("docs-again", "spam-lora", "talk", "sums-long"),
)


@dataclass(frozen=True)
class Contender:
    """A method with its settings.

    Attributes:
        method: Name of the method.
        density: Share of the changes that is kept, for methods that drop some.
        total: Sum of the weights, for methods that add changes: 1 for the mean, the
            number of adapters for the sum.
        space: Coordinates of the changes; None for the method's own.
        magnitudes: Rule for magnitudes; None for the method's own.
    """

    method: str
    density: float | None = None
    total: float | None = None
    space: str | None = None
    magnitudes: str | None = None

    @property
    def name(self) -> str:
        """A name such as ``dare, density 0.5, total 1.41``."""
        parts = [self.method]
        if self.density is not None:
            parts.append(f"density {self.density:g}")
        if self.total is not None:
            parts.append(f"total {self.total:.3g}")
        if self.space is not None:
            parts.append(f"space {self.space}")
        if self.magnitudes is not None:
            parts.append(f"magnitudes {self.magnitudes}")
        return ", ".join(parts)

    def merge(self, adapters: Sequence[Adapter], model: Any) -> Adapter:
        """Merge adapters of a loaded base."""
        count = len(adapters)
        weights = None if self.total is None else [self.total / count] * count
        options = Options(
            density=self.density, space=self.space, magnitudes=self.magnitudes
        )
        return merge_adapters_report(
            adapters,
            model=model,
            method=self.method,
            weights=weights,
            check_base=False,
            options=options,
        ).adapter


def contenders(count: int) -> list[Contender]:
    """Return the contenders that can merge `count` adapters, the likeliest first."""
    root, whole = math.sqrt(count), float(count)
    wanted = [
        Contender("karcher"),
        Contender("magnitude_weighted"),
        Contender("task_arithmetic", total=root),
        Contender("task_arithmetic", total=whole),
        Contender("ties", 0.2),
        Contender("ties", 0.5),
        Contender("ties", 0.5, space="core"),
        Contender("tsv", total=root),
        Contender("tsv", total=root, space="core"),
        Contender("dare_ties", 0.5),
        *(
            Contender("task_arithmetic", total=root, magnitudes=rule)
            for rule in ("mean", "mover", "ties", "base")
        ),
        Contender("tsv", total=1.0),
        Contender("dare", 0.5, root),
        Contender("sce"),
        Contender("model_stock"),
        Contender("breadcrumbs_ties", 0.9, root),
        Contender("della", 0.5),
        Contender("linear"),
        Contender("slerp"),
        Contender("nuslerp"),
        Contender("nmean"),
        Contender("breadcrumbs", 0.9, root),
        Contender("della_linear", 0.5, root),
    ]
    return [one for one in wanted if merges(one.method, count)]


FIRST = 10
"""Contenders of the first pass over the combinations."""


def merges(method: str, count: int) -> bool:
    """Whether a method can merge `count` adapters."""
    fewest, most = METHODS[method].inputs
    return fewest <= count and (most is None or count <= most)
