"""The runs of study 2: methods, learning rates and seeds (docs/studies/when.md)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS = {  # learning rates to choose from
    "lora": (7.5e-5, 3e-4, 1.2e-3),
    "dora": (7.5e-5, 3e-4, 1.2e-3),
    "direction": (7.5e-5, 3e-4, 1.2e-3),
    "magnitude": (1.2e-3, 4.8e-3, 1.92e-2),
    "full": (2.5e-6, 1e-5, 4e-5),
}
FIRST = ("lora", "dora", "direction")
CHOOSING_SEED, SEEDS, MORE_SEEDS = 100, (0, 1, 2), (3, 4)


@dataclass(frozen=True)
class Job:
    """One training run."""

    method: str
    rate: float
    seed: int


Results = Mapping[Job, Mapping[str, Any]]


def jobs(results: Results) -> Iterator[Job]:
    """Yield the runs that are not done, in the order of their importance.

    Args:
        results: The runs that are done; the caller adds each yielded one.
    """
    for methods in (FIRST, [name for name in METHODS if name not in FIRST]):
        for method in methods:
            for rate in METHODS[method]:
                job = Job(method, rate, CHOOSING_SEED)
                if job not in results:
                    yield job
        for seed in (*SEEDS, *MORE_SEEDS):
            for method in methods:
                job = Job(method, best_rate(method, results), seed)
                if job not in results:
                    yield job


def best_rate(method: str, results: Results) -> float:
    """The rate of the run with the highest reward on the validation prompts."""
    return max(
        METHODS[method],
        key=lambda rate: results[Job(method, rate, CHOOSING_SEED)]["valid_reward"],
    )


def read(path: Path) -> dict[Job, dict[str, Any]]:
    """Read the runs of a file."""
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines]
    return {Job(e["method"], e["rate"], e["seed"]): e for e in entries}
