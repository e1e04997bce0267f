"""The grid of study 1: cells, learning rates and seeds (docs/studies/when.md)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

TASKS = ("docstrings", "records", "topics")
BASES = ("dense", "4-bit")
TABLES = tuple((task, base) for base, task in product(BASES, TASKS))
"""Tasks and bases in the order of the runs."""
RANKS = (1, 4, 16)
RANKED = ("lora", "dora", "direction")
STEPS = 48
LONGER_STEPS = 53  # for LoRA, in the time that DoRA takes for 48
SEEDS, MORE_SEEDS = (0, 1, 2), (3, 4)
_RATES = {"magnitude": 2e-3, "full": 1e-5}
_RATE_COUNT, _MOST_ADDED = 7, 2


@dataclass(frozen=True, order=True)
class Cell:
    """A task, a base and a method, whose learning rate is to be chosen.

    Attributes:
        rank: Rank of the update; 0 for methods without one.
        equal_to: Rank of the DoRA whose number of trained parameters LoRA gets; 0 for
            LoRA of its own rank.
        steps: Number of training steps.
    """

    task: str
    base: str
    method: str
    rank: int = 0
    equal_to: int = 0
    steps: int = STEPS

    def rate(self, place: int) -> float:
        """Learning rate of a place on the ladder; each step doubles it."""
        return _RATES.get(self.method, 5e-4) * 2.0**place


@dataclass(frozen=True)
class Job:
    """One training run."""

    cell: Cell
    place: int
    seed: int


Results = Mapping[Job, Mapping[str, Any]]


def main_cells() -> list[Cell]:
    """Return the cells whose seven rates are tried, the most important ones first."""
    return [
        Cell(task, base, method, rank)
        for task, base in TABLES
        for method, ranks in (
            *((name, RANKS) for name in RANKED),
            ("magnitude", (0,)),
            *((("full", (0,)),) if base == "dense" else ()),
        )
        for rank in ranks
    ]


def wanted(cell: Cell, results: Results) -> list[Job]:
    """Return the runs of a cell that are not done, as far as they can be known.

    The first are those of three seeds at seven rates. Their results say which rate is
    the best, which decides whether rates are added, and where two more seeds run.
    """
    places = [*range(_RATE_COUNT)]
    while not (missing := _missing(cell, places, SEEDS, results)):
        best, added = best_place(cell, results, places), len(places) - _RATE_COUNT
        if added == _MOST_ADDED or min(places) < best < max(places):
            around = {best - 1, best, best + 1}.intersection(places)
            return _missing(cell, sorted(around), (*SEEDS, *MORE_SEEDS), results)
        places = sorted([*places, best - 1 if best == min(places) else best + 1])
    return missing


def jobs(results: Results, part: str = "0/1") -> Iterator[Job]:
    """Yield the runs of a part such as ``0/2`` that are not done.

    A task and base is finished before the next; equal time, which the plan drops first,
    comes last. Later runs of a cell depend on the results of earlier ones.

    Args:
        results: The runs that are done; the caller adds each yielded one.
        part: Number of this part, and how many there are.
    """
    number, count = map(int, part.split("/"))
    cells, own = main_cells(), list[Cell]()
    for table in TABLES:
        here = [cell for cell in cells if (cell.task, cell.base) == table]
        for cell in here[number::count]:
            while missing := wanted(cell, results):
                yield from missing
        for cell in here[number::count]:
            yield from equal_parameters(cell, results)
        own += here[number::count]
    for cell in own:
        yield from equal_time(cell, results)


def equal_parameters(cell: Cell, results: Results) -> list[Job]:
    """Return the missing runs of LoRA with DoRA's number of parameters."""
    if (cell.base, cell.method) != ("dense", "lora"):
        return []
    best = best_place(cell, results)
    equal = Cell(cell.task, cell.base, "lora", cell.rank, equal_to=cell.rank)
    return _missing(equal, [best - 1, best, best + 1], (*SEEDS, *MORE_SEEDS), results)


def equal_time(cell: Cell, results: Results) -> list[Job]:
    """Return the missing runs of LoRA in DoRA's time."""
    if (cell.base, cell.method) != ("dense", "lora"):
        return []
    longer = Cell(cell.task, cell.base, "lora", cell.rank, steps=LONGER_STEPS)
    best = best_place(cell, results)
    return _missing(longer, [best], (*SEEDS, *MORE_SEEDS), results)


def best_place(
    cell: Cell, results: Results, places: Sequence[int] | None = None
) -> int:
    """Return the place of the rate with the lowest mean validation loss.

    A rate at which a run failed is not chosen.

    Args:
        cell: The cell.
        results: Results of at least one run of the cell.
        places: Places to choose from; None for all in the results.
    """
    losses: dict[int, list[float]] = {}
    for job, result in results.items():
        if job.cell == cell and (places is None or job.place in places):
            loss = result["valid_loss"]
            losses.setdefault(job.place, []).append(
                float("inf") if loss is None else loss
            )
    return min(losses, key=lambda place: sum(losses[place]) / len(losses[place]))


def _missing(
    cell: Cell, places: Sequence[int], seeds: Sequence[int], results: Results
) -> list[Job]:
    jobs = (Job(cell, place, seed) for place, seed in product(places, seeds))
    return [job for job in jobs if job not in results]
