"""Tables of study 1 for H1 to H7, each with its verdicts."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
from decide import (
    Difference,
    contrast,
    correlation,
    difference,
    holm,
    octaves_within,
    sign_test,
)
from grid import BASES, LONGER_STEPS, RANKS, TABLES, TASKS, Cell
from runs import Line, Runs

Compared = tuple[str, Difference | None]
"""Cells of a table, and a difference; None where runs are missing."""


def same_rank(runs: Runs, first: str, second: str) -> Iterator[Compared]:
    """Two methods at equal rank (H1, H6)."""
    for (task, base), rank in product(TABLES, RANKS):
        cells = Cell(task, base, first, rank), Cell(task, base, second, rank)
        yield f"{task} | {base} | {rank}", _compare(runs, cells)


def same_cost(runs: Runs) -> Iterator[Compared]:
    """DoRA and LoRA of as many trained numbers, or of as much time (H2)."""
    for task, rank in product(TASKS, RANKS):
        dora = Cell(task, "dense", "dora", rank)
        for name, lora in (
            ("parameters", Cell(task, "dense", "lora", rank, rank)),
            ("time", Cell(task, "dense", "lora", rank, 0, LONGER_STEPS)),
        ):
            yield f"{task} | {name} | {rank}", _compare(runs, (dora, lora))


def low_ranks(runs: Runs) -> Iterator[Compared]:
    """DoRA's gain at the lowest rank, less that at the highest (H3)."""
    for task, base in TABLES:
        gains = (_gain(task, base, rank) for rank in (RANKS[0], RANKS[-1]))
        yield f"{task} | {base}", _compare(runs, *gains)


def packed_bases(runs: Runs) -> Iterator[Compared]:
    """DoRA's gain on the 4-bit base, less that on the dense one (H4)."""
    for task, rank in product(TASKS, RANKS):
        gains = (_gain(task, base, rank) for base in ("4-bit", "dense"))
        yield f"{task} | {rank}", _compare(runs, *gains)


def _gain(task: str, base: str, rank: int) -> tuple[Cell, Cell]:
    return Cell(task, base, "dora", rank), Cell(task, base, "lora", rank)


def _compare(runs: Runs, *pairs: tuple[Cell, Cell]) -> Difference | None:
    """The difference of a pair of cells, or of two pairs' differences."""
    losses = runs.pairs(*pairs)
    if losses is None:
        return None
    return difference(*losses) if len(pairs) == 1 else contrast(*losses)


def table(head: str, compared: Sequence[Compared]) -> str:
    """Differences with their verdicts, corrected for all rows of the table."""
    known = [result.p for _, result in compared if result is not None]
    corrected = iter(holm(known))
    rows = [f"| {head} | difference | verdict |"]
    rows.append("| --- " * (head.count("|") + 3) + "|")
    for name, result in compared:
        if result is None:
            rows.append(f"| {name} | runs are missing | - |")
            continue
        verdict = result.verdict(next(corrected))
        interval = f"{result.mean:+.1%} ({result.low:+.1%} to {result.high:+.1%})"
        rows.append(f"| {name} | {interval} | {verdict} |")
    missing = len(compared) - len(known)
    if missing:
        rows.append(f"\n{missing} of {len(compared)} comparisons lack runs.")
    return "\n".join(rows)


def widths(runs: Runs) -> str:
    """Ranges of good rates of DoRA and LoRA, with a sign test (H5)."""
    rows = ["| task | base | rank | DoRA | LoRA |", "| --- " * 5 + "|"]
    wins = losses = missing = 0
    for (task, base), rank in product(TABLES, RANKS):
        cells = [Cell(task, base, method, rank) for method in ("dora", "lora")]
        if not all(map(runs.is_complete, cells)):
            missing += 1
            continue
        curves = [runs.curve(cell) for cell in cells]
        dora, lora = (octaves_within([*c], [*c.values()]) for c in curves)
        wins, losses = wins + (dora > lora), losses + (dora < lora)
        rows.append(f"| {task} | {base} | {rank} | {dora:.2f} | {lora:.2f} |")
    rows.append(
        f"\nDoRA's range is wider in {wins} cells and narrower in {losses}: sign test "
        f"p = {sign_test(wins, losses):.2g}; {missing} comparisons lack runs."
    )
    return "\n".join(rows)


Measure = Callable[[np.ndarray], float]
"""A measure of a run from its matrices, each with delta M, delta D, effective rank."""

MEASURES: dict[str, Measure] = {
    "correlation of ΔM and ΔD": lambda rows: _pearson(rows[:, 0], rows[:, 1]),
    "mean ΔM": lambda rows: float(rows[:, 0].mean()),
    "mean ΔD": lambda rows: float(rows[:, 1].mean()),
    "mean entropy": lambda rows: float(np.log(np.maximum(rows[:, 2], 1)).mean()),
}


def measured(runs: Runs, task: str, base: str) -> list[tuple[Line, np.ndarray]]:
    """The runs with measures, and these by matrix, shape ``(matrices, 3)``."""
    return [
        (line, np.array([*line["geometry"].values()]))
        for cell in runs.cells
        if (cell.task, cell.base) == (task, base)
        for line in runs.of(cell)
        if "geometry" in line
    ]


def geometry(runs: Runs) -> str:
    """Rank correlation of measures of the change with the test loss, by task (H7)."""
    rows = ["| task | runs | cells | measure | Spearman's ρ | decided |"]
    rows.append("| --- " * 6 + "|")
    for task in TASKS:
        found = [each for base in BASES for each in measured(runs, task, base)]
        lines = [line for line, _ in found]
        groups = [tuple(line["cell"].values()) for line in lines]
        if len({*groups}) < 5:
            rows.append(f"| {task} | {len(lines)} | {len({*groups})} | - | - | - |")
            continue
        losses = np.array([line["test_loss"] for line in lines])
        for name, measure in MEASURES.items():
            values = np.array([measure(matrices) for _, matrices in found])
            usable = np.isfinite(values)
            own = [group for group, use in zip(groups, usable, strict=True) if use]
            start = f"| {task} | {len(own)} | {len({*own})} | {name} | "
            if not own or np.ptp(values[usable]) == 0:
                rows.append(f"{start}constant | - |")
                continue
            result = correlation(values[usable], losses[usable], own)
            rows.append(
                f"{start}"
                f"{result.rho:+.2f} ({result.low:+.2f} to {result.high:+.2f}) | "
                f"{'yes' if result.is_decided else 'no'} |"
            )
    return "\n".join(rows)


def entropy(runs: Runs) -> str:
    """Whether DoRA's update has more entropy of singular values than LoRA's."""
    rows = ["| task | base | rank | DoRA | LoRA | direction | full |"]
    rows.append("| --- " * 7 + "|")
    wins = losses = 0
    for (task, base), rank in product(TABLES, RANKS):
        means = []
        for method in ("dora", "lora", "direction", "full"):
            cell = Cell(task, base, method, 0 if method == "full" else rank)
            lines = runs.best(cell) if runs.is_complete(cell) else []
            values = [
                MEASURES["mean entropy"](np.array([*line["geometry"].values()]))
                for line in lines
                if "geometry" in line
            ]
            means.append(float(np.mean(values)) if values else None)
        if means[0] is not None and means[1] is not None:
            wins, losses = wins + (means[0] > means[1]), losses + (means[0] < means[1])
            shown = ["-" if mean is None else f"{mean:.2f}" for mean in means]
            rows.append(f"| {task} | {base} | {rank} | {' | '.join(shown)} |")
    rows.append(
        f"\nDoRA's entropy is higher in {wins} cells and lower in {losses}: sign test "
        f"p = {sign_test(wins, losses):.2g}."
    )
    return "\n".join(rows)


def _pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation; NaN where a measure is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])
