"""The stored runs of study 1: cells, curves, best rates, and what is missing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from decide import Pair
from grid import (
    STEPS,
    Cell,
    Job,
    best_place,
    equal_parameters,
    equal_time,
    main_cells,
    wanted,
)

Line = Mapping[str, Any]


def read_lines(path: Path) -> list[Line]:
    """Read the runs of a file, without the lines that describe tasks."""
    if not path.exists():
        return []
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return [line for line in lines if "seed" in line]


class Runs:
    """The lines of the results.

    Attributes:
        lines: All lines.
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self._results: dict[Job, Line] = {}
        self._of: dict[Cell, dict[Job, Line]] = {}
        for line in sorted(lines, key=lambda line: (line["place"], line["seed"])):
            cell = Cell(**line["cell"])
            job = Job(cell, line["place"], line["seed"])
            self._results[job] = line
            self._of.setdefault(cell, {})[job] = line

    @property
    def cells(self) -> list[Cell]:
        """The cells with results."""
        return sorted(self._of)

    def of(self, cell: Cell) -> list[Line]:
        """The runs of a cell, by rate and seed."""
        return [*self._of.get(cell, {}).values()]

    def is_complete(self, cell: Cell) -> bool:
        """Whether all runs of a cell are done."""
        own = self._of.get(cell, {})
        if not cell.equal_to and cell.steps == STEPS:
            return bool(own) and not wanted(cell, own)
        origin = Cell(cell.task, cell.base, cell.method, cell.rank)
        further = equal_parameters if cell.equal_to else equal_time
        if not self.is_complete(origin):
            return False
        return not further(origin, {**self._of[origin], **own})

    def curve(self, cell: Cell) -> dict[int, float]:
        """Mean validation loss by place; inf where a run failed."""
        losses: dict[int, list[float]] = {}
        for job, line in self._of[cell].items():
            losses.setdefault(job.place, []).append(_loss(line))
        return {place: float(np.mean(own)) for place, own in sorted(losses.items())}

    def best(self, cell: Cell) -> list[Line]:
        """The runs of all seeds at the best rate; none if each rate failed."""
        own = self._of[cell]
        place = best_place(cell, own)
        lines = [line for job, line in own.items() if job.place == place]
        return [] if any(line["valid_loss"] is None for line in lines) else lines

    def pairs(self, *pairs: tuple[Cell, Cell]) -> list[Pair] | None:
        """Losses of pairs of cells at their best rates, of the seeds that all have.

        Returns:
            For each pair the rows' losses, or None if a cell is not complete.
        """
        cells = [cell for pair in pairs for cell in pair]
        if not all(map(self.is_complete, cells)):
            return None
        lines = [{line["seed"]: line for line in self.best(cell)} for cell in cells]
        seeds = sorted(set.intersection(*({*by} for by in lines)))
        if not seeds:
            return None
        losses = [np.array([by[seed]["row_losses"] for seed in seeds]) for by in lines]
        return [*zip(losses[::2], losses[1::2], strict=True)]

    def progress(self) -> str:
        """How many cells and runs are done, in words."""
        cells = main_cells()
        complete = sum(map(self.is_complete, cells))
        begun = sum(cell in self._of for cell in cells) - complete
        hours = sum(line["cpu_seconds"] for line in self.lines) / 3600
        failed = sum(line["valid_loss"] is None for line in self.lines)
        diverged = sum(map(is_lost, self.lines)) - failed
        return (
            f"{len(self.lines)} runs, {failed} failed, {diverged} more diverged, "
            f"{hours:.1f} core-hours. Of {len(cells)} cells, {complete} are complete, "
            f"{begun} begun and {len(cells) - complete - begun} missing."
        )


def is_lost(line: Line) -> bool:
    """Whether a run failed or diverged."""
    return line["valid_loss"] is None or line["diverged"]


def _loss(line: Line) -> float:
    return float("inf") if line["valid_loss"] is None else line["valid_loss"]
