"""Adapters, combinations and contenders of `merge_grid.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from _grid_table import AUTO

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.merge.adapters.dense import Options
from mlx_dora.merge.adapters.merge import merge_adapters_report
from mlx_dora.merge.fisher.information import Fisher
from mlx_dora.merge.methods import METHODS
from mlx_dora.merge.methods.magnitudes import RULES


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
    "sort": Recipe("sorting", iters=30, seed=2),
    "records": Recipe("records", rank=4, iters=20, seed=2),
    "spam-lora": Recipe("spam", rank=4, kind="lora", seed=2),
    "talk-hot": Recipe("dialogue", iters=15, seed=2, bias_correction=False),
    "docs-long": Recipe("docstrings", rank=16, iters=60, seed=2),
}
MADE_ON = (
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
"""Combinations on which the rule of `compare` was made."""
HELD_OUT = (
    ("spam", "records-lora"),
    ("docs-again", "talk", "sums"),
    ("docs-hot", "spam"),
    ("sort", "records"),
    ("docs", "sort"),
    ("spam-lora", "sort"),
    ("spam-lora", "sort", "records"),
    ("docs", "talk", "spam-lora", "records"),
    ("talk-hot", "sums-hot"),
    ("docs-long", "spam-lora"),
)
"""Combinations on which the rule is tested; the last seven have an adapter that was
trained after the rule was made."""
COMBINATIONS = (*MADE_ON, *HELD_OUT)
SAMPLE = (
    ("docs", "spam"),
    ("docs", "spam", "talk"),
    ("docs-hot", "sums-hot"),
    ("spam-lora", "sort", "records"),
)
"""Combinations on which all methods and settings are measured."""


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
        self,
        adapters: Sequence[Adapter],
        tasks: Sequence[str],
        model: Any,
        fisher: Sequence[Fisher | str | Path] | None = None,
        weights: Sequence[float] | None = None,
    ) -> Adapter:
        """Merge adapters of these tasks and of a loaded base.

        `weights` are used in place of those of the contender.
        """
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
            weights=weights or self.weights(tasks),
            rank=self.rank,
            check_base=False,
            options=options,
            fisher=fisher,
        ).adapter


def contenders(names: Sequence[str]) -> list[list[Contender]]:
    """Return the contenders for a combination of adapters, in passes.

    A pass is over all combinations. All but the first have a single contender, or none:
    if it cannot merge so many adapters, and where only those of `SAMPLE` are measured.
    """
    tasks = [ADAPTERS[name].task for name in names]
    count = len(names)
    root, more, whole = math.sqrt(count), count**0.75, float(count)
    tsv = Contender("tsv", total=more, space="core")
    added = Contender("task_arithmetic", total=root)
    first = [
        Contender("karcher"),
        added,
        Contender("task_arithmetic", total=whole),
        Contender("tsv", total=root, space="core"),
        tsv,
        replace(tsv, total=whole),
    ]
    if len({*tasks}) < count:
        first += [replace(one, total=None, grouped=True) for one in (added, tsv)]
    widely = [
        Contender("iso", total=root),
        replace(added, calibrate="pico"),
        replace(tsv, space="ctm", rank=8),
        replace(tsv, rank=8),
        *(replace(tsv, magnitudes=rule) for rule in RULES if rule != "mean"),
        Contender("ties", 0.5, space="knots"),
        Contender("ties", 0.5, space="core"),
        replace(tsv, calibrate="pico"),
        Contender("iso", total=whole),
        Contender("ties", 0.5),
    ]
    sampled = _sampled(added, root) if tuple(names) in SAMPLE else []
    rest = [*widely, *sampled]
    return [first, *([one] if merges(one.method, count) else [] for one in rest)]


def _sampled(added: Contender, root: float) -> list[Contender]:
    """Contenders that are measured on the combinations of `SAMPLE` only."""
    return [
        *(replace(added, magnitudes=rule) for rule in RULES if rule != "own"),
        replace(added, rank=8),
        replace(added, space="ctm", rank=8),
        Contender("ties", 0.2, space="core"),
        Contender("dare_ties", 0.5, space="core"),
        Contender("dare", 0.5, root, space="core"),
        Contender("sce", space="core"),
        Contender("breadcrumbs", 0.9, root, space="core"),
        Contender("breadcrumbs_ties", 0.9, root, space="core"),
        Contender("della", 0.5, space="core"),
        Contender("della_linear", 0.5, root, space="core"),
        Contender("magnitude_weighted"),
        Contender("model_stock"),
        Contender("linear"),
        Contender("nmean"),
        Contender("slerp"),
        Contender("nuslerp"),
        Contender("fisher"),
        Contender("ties", 0.2),
        Contender("dare_ties", 0.5),
        Contender("dare", 0.5, root),
        Contender("sce"),
        Contender("breadcrumbs", 0.9, root),
        Contender("breadcrumbs_ties", 0.9, root),
        Contender("della", 0.5),
        Contender("della_linear", 0.5, root),
        Contender("tsv", total=root),
    ]


def merges(method: str, count: int) -> bool:
    """Whether a method can merge `count` adapters."""
    fewest, most = METHODS[method].inputs
    return fewest <= count and (most is None or count <= most)


def schedule(share: tuple[int, int]) -> list[tuple[Any, tuple[str, ...]]]:
    """Return passes and combinations in order: the likeliest contenders, then samples.

    A pass is a number of `contenders`, or `AUTO`.
    """
    first, step = share
    passes = [*range(1, len(contenders(SAMPLE[0])))]
    order = [(0, names) for names in COMBINATIONS[first::step]]
    order += product(passes, SAMPLE[first::step])
    return [*order, *product([AUTO, *passes], COMBINATIONS[first::step])]
