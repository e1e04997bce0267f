"""Decisions of the study: paired bootstrap, Holm's correction, ranges of rates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

REPLICATES = 10_000
LEVEL = 0.05
SMALLEST = 0.01
"""Smallest difference of interest, as a share of LoRA's loss."""

Pair = tuple[np.ndarray, np.ndarray]
"""Losses of two methods, summed by row, each of shape ``(seeds, rows)``."""
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Values of replicates, shape ``(replicates,)``, from how often each draws each seed
and row, shapes ``(replicates, seeds)`` and ``(replicates, rows)``."""


@dataclass(frozen=True)
class Difference:
    """Difference of two methods; of losses, as a share of the second's.

    Attributes:
        mean: Mean difference.
        low, high: 95 % interval.
        p: Two-sided bootstrap p-value, at least 2 / (replicates + 1).
    """

    mean: float
    low: float
    high: float
    p: float

    def verdict(self, corrected: float, smallest: float = SMALLEST) -> str:
        """Return better, worse, alike or undecided; of losses, less is better.

        Args:
            corrected: The p-value after correction for all comparisons.
            smallest: Smallest difference of interest.
        """
        if corrected < LEVEL and abs(self.mean) > smallest:
            return "better" if self.mean < 0 else "worse"
        if self.low > -smallest and self.high < smallest:
            return "alike"
        return "undecided"


def difference(pair: Pair, *, seed: int = 0) -> Difference:
    """Compare the first method of a pair with the second, by seed and row.

    The loss per target is the sum over rows divided by the number of targets, which is
    the same for both: the share of the difference needs the sums only.
    """
    return _bootstrap(lambda s, r: _share(pair, s, r), pair[0].shape, seed)


def contrast(first: Pair, second: Pair, *, seed: int = 0) -> Difference:
    """Compare the difference of one pair with that of another, by seed and row."""
    return _bootstrap(
        lambda s, r: _share(first, s, r) - _share(second, s, r),
        first[0].shape,
        seed,
    )


def shortfall(pair: Pair, *, seed: int = 0) -> Difference:
    """Compare mean rewards of shape ``(seeds, prompts)``, by seed and prompt.

    The difference is absolute, and negative if the first method gains more.
    """

    def mean(rewards: np.ndarray, s: np.ndarray, r: np.ndarray) -> np.ndarray:
        return _total(rewards, s, r) / rewards.size

    return _bootstrap(
        lambda s, r: mean(pair[1], s, r) - mean(pair[0], s, r), pair[0].shape, seed
    )


def _bootstrap(of: Statistic, shape: tuple[int, ...], seed: int) -> Difference:
    draw = np.random.default_rng(seed)
    drawn = (draw.multinomial(n, np.full(n, 1 / n), REPLICATES) for n in shape)
    values = of(*drawn)
    low, high = np.quantile(values, [LEVEL / 2, 1 - LEVEL / 2])
    beyond = min((values <= 0).sum(), (values >= 0).sum())
    p = min(1.0, 2 * (beyond + 1) / (REPLICATES + 1))
    [mean] = of(*(np.ones((1, n)) for n in shape))
    return Difference(float(mean), float(low), float(high), float(p))


def _total(values: np.ndarray, seeds: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return ((seeds @ values) * rows).sum(axis=1)


def _share(pair: Pair, seeds: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return _total(pair[0], seeds, rows) / _total(pair[1], seeds, rows) - 1


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's corrected p-values, in the order given."""
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of so many wins and losses (ties left out)."""
    count, most = wins + losses, max(wins, losses)
    tail = sum(comb(count, k) for k in range(most, count + 1)) / 2**count
    return min(1.0, 2 * tail)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation, with its 95 % interval."""

    rho: float
    low: float
    high: float

    @property
    def is_decided(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def correlation(
    first: np.ndarray, second: np.ndarray, groups: Sequence[object], seed: int = 0
) -> Correlation:
    """Correlate two measures of runs; the bootstrap draws whole groups of runs.

    Args:
        first: A measure of each run.
        second: Another.
        groups: What each run belongs to; runs of a group are not independent.
        seed: Seed of the bootstrap.
    """
    _, group = np.unique([repr(group) for group in groups], return_inverse=True)
    count = int(group.max()) + 1
    draw = np.random.default_rng(seed)
    drawn = draw.multinomial(count, np.full(count, 1 / count), REPLICATES)
    values = _weighted_spearman(first, second, drawn[:, group])
    # A replicate of one distinct value has no correlation.
    low, high = np.nanquantile(values, [LEVEL / 2, 1 - LEVEL / 2])
    return Correlation(spearman(first, second), float(low), float(high))


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation; tied values share their mean rank."""
    [value] = _weighted_spearman(first, second, np.ones((1, len(first))))
    return float(value)


def _weighted_spearman(
    first: np.ndarray, second: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Correlations of replicates, where ``weights`` says how often each has a run."""
    count = weights.sum(axis=1, keepdims=True)

    def centered(values: np.ndarray) -> np.ndarray:
        ranks = _ranks(values, weights)
        return ranks - (weights * ranks).sum(axis=1, keepdims=True) / count

    x, y = centered(first), centered(second)
    products = [(weights * pair).sum(axis=1) for pair in (x * y, x * x, y * y)]
    with np.errstate(invalid="ignore"):
        return products[0] / np.sqrt(products[1] * products[2])


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks of runs that each replicate has several times, shape of ``weights``."""
    distinct, place = np.unique(values, return_inverse=True)
    counts = np.zeros((len(distinct), len(weights)))
    np.add.at(counts, place, weights.T)
    return (counts.cumsum(axis=0) - (counts - 1) / 2)[place].T


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
