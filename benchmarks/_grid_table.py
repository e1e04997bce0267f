"""Tables of the results of `merge_grid.py`, in Markdown."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALONE = "(alone)"
BASE = "(base)"
ADVICE = "(advice)"
AUTO = "(auto)"
TRAINED = "(trained)"
CLOSE = 0.02
"""Difference of mean losses that counts as a tie with the best."""

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Combination:
    """The test losses of one combination of adapters.

    Attributes:
        names: The adapters.
        lines: The results by contender. Contenders of several seeds or settings have
            different names.
    """

    names: tuple[str, ...]
    lines: Mapping[str, Line]

    def losses(self, contender: str) -> list[float]:
        """Losses on the tasks, in alphabetical order."""
        tasks = self.lines[contender]["tasks"]
        return [tasks[task]["test"] for task in sorted(tasks)]

    def mean(self, contender: str) -> float:
        """Mean loss over the tasks."""
        return statistics.fmean(self.losses(contender))

    def shares(self, contender: str) -> list[float]:
        """Gain over the base on each task, as a share of the adapter's own gain."""
        kinds = (BASE, contender, ALONE)
        together = zip(*map(self.losses, kinds), strict=True)
        return [(base - loss) / (base - own) for base, loss, own in together]

    def worst(self, contender: str) -> float:
        """The least of `shares`."""
        return min(self.shares(contender))

    @property
    def contenders(self) -> list[str]:
        """The merges that were measured."""
        return [name for name in self.lines if not name.startswith("(")]

    @property
    def advised(self) -> str | None:
        """What `compare_adapters` advises, if it was measured."""
        name = self.lines.get(ADVICE, {}).get("advised")
        return name if name in self.lines else None

    @property
    def least(self) -> float:
        """The least mean loss on the test rows."""
        return min(map(self.mean, self.contenders))

    def regret(self, contender: str) -> float:
        """Mean test loss above that of the best contender."""
        return self.mean(contender) - self.least


def combinations(lines: Sequence[Line]) -> list[Combination]:
    """Group results by combination, in their order, where a merge was measured."""
    found: dict[tuple[str, ...], dict[str, Line]] = {}
    for line in lines:
        if line["contender"] == TRAINED:
            continue
        found.setdefault(tuple(line["of"]), {})[line["contender"]] = line
    grid = [Combination(names, by_name) for names, by_name in found.items()]
    return [one for one in grid if one.contenders]


def general(contender: str, count: int) -> str:
    """Name a contender for any number of adapters: totals as 1, √N, N^¾ and N."""
    root = f"total {count**0.5:.3g}"
    whole = f"total {count:.3g}"
    parts = contender.split(", ")
    more = f"total {count**0.75:.3g}"
    names = {root: "sum √N", more: "sum N^¾", whole: "sum N", "total 1": "sum 1"}
    return ", ".join(names.get(part, part) for part in parts)


def chosen(grid: Sequence[Combination]) -> Iterator[tuple[str, list[str | None]]]:
    """Yield ways to choose a merge, and what they choose in each combination."""
    yield "*with data*", [AUTO if AUTO in one.lines else None for one in grid]
    yield "*without data*", [one.advised for one in grid]


def tables(
    lines: Sequence[Line], held_out: Sequence[tuple[str, ...]] = ()
) -> list[str]:
    """Return the tables of ``docs/merging.md``.

    The combinations; the contenders; and those on combinations that were held out when
    the rule of `compare_adapters` was made.
    """
    grid = combinations(lines)
    first = [one for one in grid if one.names not in held_out]
    last = [one for one in grid if one.names in held_out]
    text = [*_legend([*first, *last]), "", *_results(first, 1)]
    return [*text, "", *_results(last, len(first) + 1)] if last else text


def _legend(grid: Sequence[Combination]) -> Iterator[str]:
    yield "| | adapters | tasks: loss of the base, of the adapter alone | best mean |"
    yield "| --- | --- | --- | --- |"
    for place, one in enumerate(grid, 1):
        tasks = sorted(one.lines[BASE]["tasks"])
        pairs = zip(tasks, one.losses(BASE), one.losses(ALONE), strict=True)
        values = ", ".join(f"{t} {base:.2f}, {own:.2f}" for t, base, own in pairs)
        best = min(one.contenders, key=one.mean)
        name = general(best, len(one.names))
        yield (
            f"| {place} | {' + '.join(one.names)} | {values} | "
            f"{one.mean(best):.3f} ({name}) |"
        )


def _results(grid: Sequence[Combination], start: int) -> Iterator[str]:
    columns: dict[str, list[str | None]] = {}
    for place, one in enumerate(grid):
        for name in one.contenders:
            row = columns.setdefault(general(name, len(one.names)), [None] * len(grid))
            row[place] = name
    rows = [*columns.items(), *chosen(grid)]
    heads = " | ".join(str(start + place) for place in range(len(grid)))
    yield f"| | {heads} | above the best | within {CLOSE:g} | above the base |"
    yield "| --- |" + " --- |" * (len(grid) + 3)

    def order(row: tuple[str, list[str | None]]) -> tuple[bool, int, float]:
        regrets = _regrets(grid, row[1])
        return row[0].startswith("*"), -len(regrets), statistics.fmean(regrets)

    for name, picks in sorted((row for row in rows if any(row[1])), key=order):
        cells = [
            "" if pick is None else f"{one.mean(pick):.2f} ({one.worst(pick):.0%})"
            for one, pick in zip(grid, picks, strict=True)
        ]
        regrets = _regrets(grid, picks)
        spread = statistics.pstdev(regrets)
        close = sum(regret <= CLOSE for regret in regrets)
        above = sum(
            one.worst(pick) < 0
            for one, pick in zip(grid, picks, strict=True)
            if pick is not None
        )
        yield (
            f"| {name} | {' | '.join(cells)} | {statistics.fmean(regrets):.3f} ± "
            f"{spread:.3f} | {close} of {len(regrets)} | {above} |"
        )


def _regrets(grid: Sequence[Combination], picks: Sequence[str | None]) -> list[float]:
    return [
        one.regret(pick)
        for one, pick in zip(grid, picks, strict=True)
        if pick is not None
    ]
