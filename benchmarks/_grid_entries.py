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
    """How an adapter is trained.

    Without the correction of Adam's bias, which is MLX's default, the first steps are
    larger, and the update ends up larger.
    """

    task: str
    rank: int = 8
    iters: int = 30
    kind: str = "dora"
    seed: int = 0
    bias_correction: bool = True


ADAPTERS = {
    "docs": Recipe("docstrings"),
    "docs-again": Recipe("docstrings", seed=1),
    "spam": Recipe("spam"),
    "talk": Recipe("dialogue"),
    "sums": Recipe("sums", rank=16),
    "sums-lora": Recipe("sums", rank=4, iters=80, kind="lora", seed=1),
    "records-lora": Recipe("records", rank=32, iters=40, kind="lora", seed=1),
    "docs-hot": Recipe("docstrings", bias_correction=False),
    "sums-hot": Recipe("sums", bias_correction=False),
}
COMBINATIONS = (
    ("docs", "spam"),
    ("docs", "sums"),
    ("docs", "spam", "talk"),
    ("docs", "docs-again"),
    ("docs", "docs-again", "spam"),
    ("spam", "talk"),
    ("docs", "sums-lora"),
    ("sums-lora", "spam"),
    ("docs", "docs-again", "sums"),
    ("docs-hot", "sums-hot"),
    ("docs", "records-lora"),
    ("docs-hot", "sums-hot", "records-lora"),
    ("docs", "spam", "talk", "sums-lora"),
    ("docs", "spam", "sums", "records-lora"),
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
        calibrate: Calibration before the merge.
        grouped: Adapters of the same task share one weight, and the total is the square
            root of the number of tasks.
        rank: Maximum rank of the merge.
    """

    method: str
    density: float | None = None
    total: float | None = None
    space: str | None = None
    magnitudes: str | None = None
    calibrate: str | None = None
    grouped: bool = False
    rank: int | None = None

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
        if self.calibrate is not None:
            parts.append(f"calibrate {self.calibrate}")
        if self.grouped:
            parts.append("by task")
        if self.rank is not None:
            parts.append(f"rank {self.rank}")
        return ", ".join(parts)

    def weights(self, tasks: Sequence[str]) -> list[float] | None:
        """Return the weights for adapters of these tasks; None if it takes none."""
        if self.grouped:
            among = math.sqrt(len({*tasks}))
            return [1 / (among * tasks.count(task)) for task in tasks]
        if self.total is None:
            return None
        return [self.total / len(tasks)] * len(tasks)

    def merge(
        self, adapters: Sequence[Adapter], tasks: Sequence[str], model: Any
    ) -> Adapter:
        """Merge adapters of these tasks and of a loaded base."""
        options = Options(
            density=self.density,
            space=self.space,
            magnitudes=self.magnitudes,
            calibrate=self.calibrate,
        )
        return merge_adapters_report(
            adapters,
            model=model,
            method=self.method,
            weights=self.weights(tasks),
            rank=self.rank,
            check_base=False,
            options=options,
        ).adapter


def contenders(tasks: Sequence[str]) -> list[list[Contender]]:
    """Return the contenders for adapters of these tasks, in passes.

    A pass is over all combinations. The first has the likeliest contenders, each other
    pass a single one (none, if it cannot merge so many adapters).
    """
    count = len(tasks)
    root, more, whole = math.sqrt(count), count**0.75, float(count)
    repeats = len({*tasks}) < count
    by_task = [
        Contender("task_arithmetic", grouped=True),
        Contender("tsv", space="core", grouped=True),
    ]
    first = [
        *(by_task if repeats else ()),
        Contender("karcher"),
        Contender("task_arithmetic", total=root),
        Contender("task_arithmetic", total=whole),
        Contender("tsv", total=root, space="core"),
    ]
    second = [
        Contender("tsv", total=more, space="core"),
        Contender("tsv", total=whole, space="core"),
        Contender("iso", total=root),
        Contender("task_arithmetic", total=root, calibrate="pico"),
        Contender("task_arithmetic", total=root, magnitudes="mean"),
        Contender("task_arithmetic", total=root, magnitudes="mover"),
        Contender("task_arithmetic", total=root, magnitudes="ties"),
        Contender("task_arithmetic", total=root, magnitudes="base"),
        Contender("ties", 0.5, space="core"),
        Contender("ties", 0.5),
        Contender("magnitude_weighted"),
        Contender("ties", 0.2, space="core"),
        Contender("dare_ties", 0.5, space="core"),
        Contender("task_arithmetic", total=root, rank=8),
        Contender("task_arithmetic", total=root, space="ctm", rank=8),
        Contender("tsv", total=1.0, space="core"),
        Contender("dare", 0.5, root, space="core"),
        Contender("sce", space="core"),
        Contender("ties", 0.5, space="knots"),
        Contender("model_stock"),
        Contender("linear"),
        Contender("slerp"),
        Contender("nuslerp"),
        Contender("nmean"),
        Contender("dare_ties", 0.5),
        Contender("ties", 0.2),
        Contender("sce"),
        Contender("dare", 0.5, root),
        Contender("tsv", total=root),
        Contender("breadcrumbs_ties", 0.9, root),
        Contender("breadcrumbs", 0.9, root),
        Contender("della", 0.5),
        Contender("della_linear", 0.5, root),
    ]
    single = [[one] if merges(one.method, count) else [] for one in second]
    return [first, *single]


def merges(method: str, count: int) -> bool:
    """Whether a method can merge `count` adapters."""
    fewest, most = METHODS[method].inputs
    return fewest <= count and (most is None or count <= most)
