"""Decisions of the study: paired bootstrap, Holm's correction, ranges of rates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REPLICATES = 10_000
LEVEL = 0.05
SMALLEST = 0.01
"""Smallest difference of interest, as a share of LoRA's loss."""


@dataclass(frozen=True)
class Difference:
    """Difference of two methods' losses, as a share of the second's.

    Attributes:
        mean: Mean difference; negative if the first is better.
        low, high: 95 % interval.
        p: Two-sided bootstrap p-value, at least 1 / (replicates + 1).
    """

    mean: float
    low: float
    high: float
    p: float

    def verdict(self, corrected: float) -> str:
        """Return better, worse, alike or undecided, given the corrected p-value."""
        if corrected < LEVEL and abs(self.mean) > SMALLEST:
            return "better" if self.mean < 0 else "worse"
        if self.low > -SMALLEST and self.high < SMALLEST:
            return "alike"
        return "undecided"


def difference(
    first: np.ndarray, second: np.ndarray, targets: np.ndarray, seed: int = 0
) -> Difference:
    """Compare losses, paired by seed and row.

    Args:
        first: Summed loss of each row, shape ``(seeds, rows)``.
        second: The same for the method to compare with.
        targets: Number of targets of each row, shape ``(rows,)``.
        seed: Seed of the bootstrap.
    """
    draw = np.random.default_rng(seed)
    seeds, rows = first.shape
    shares = np.empty(REPLICATES)
    for number in range(REPLICATES):
        s, r = draw.integers(seeds, size=seeds), draw.integers(rows, size=rows)
        shares[number] = _share(first[s][:, r], second[s][:, r], targets[r])
    low, high = np.quantile(shares, [LEVEL / 2, 1 - LEVEL / 2])
    beyond = min((shares <= 0).sum(), (shares >= 0).sum())
    p = min(1.0, 2 * (beyond + 1) / (REPLICATES + 1))
    return Difference(_share(first, second, targets), float(low), float(high), p)


def _share(first: np.ndarray, second: np.ndarray, targets: np.ndarray) -> float:
    count = targets.sum() * first.shape[0]
    return float((first.sum() - second.sum()) / count / (second.sum() / count))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's corrected p-values, in the order given."""
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation; tied values share their mean rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def octaves_within(
    places: Sequence[int], losses: Sequence[float], share: float = SMALLEST
) -> float:
    """Return the octaves of rates around the best whose loss is within a share of it.

    Args:
        places: Base-2 logarithms of the rates, up to a constant; consecutive.
        losses: Mean validation losses; inf where a run failed.
        share: Allowed excess, as a share of the best loss.
    """
    best = int(np.argmin(losses))
    bound = (1 + share) * losses[best]
    width = 0.0
    for step in (-1, 1):
        here = best
        while 0 <= here + step < len(places):
            inside, outside = losses[here], losses[here + step]
            if outside > bound:
                # Where the line between the two losses meets the bound.
                width += (bound - inside) / (outside - inside)
                break
            width += 1
            here += step
    return float(width)
