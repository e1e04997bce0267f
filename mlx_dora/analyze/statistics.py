"""Correlations with what they are worth: an interval and the number of points."""

from dataclasses import dataclass

import numpy as np

_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """How two quantities go together; NaN where one of them does not vary.

    Attributes:
        pearson: Of the values.
        spearman: Of their ranks, ties sharing a rank.
        interval: 95 % bootstrap percentile interval of `pearson`.
        n: Number of points.
    """

    pearson: float
    spearman: float
    interval: tuple[float, float]
    n: int


def correlate(
    x: np.ndarray, y: np.ndarray, *, groups: np.ndarray | None = None, seed: int = 0
) -> Correlation:
    """Pearson's and Spearman's correlation with a bootstrap interval.

    Args:
        x: Values. Shape ``(n,)``.
        y: Values. Shape ``(n,)``.
        groups: Points that are not independent share a number (the checkpoints of one
            layer): whole groups are resampled then. Shape ``(n,)``.
        seed: Of the resampling.

    Returns:
        The correlation; under three groups or points, the interval is NaN.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    labels = np.arange(x.size)
    if groups is not None:
        labels = np.unique(groups, return_inverse=True)[1]
    size = int(labels.max(initial=-1)) + 1
    interval = (np.nan, np.nan)
    if size >= 3:
        # One weight a point: how often its group was drawn.
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(size, np.full(size, 1 / size), _RESAMPLES)
        found = _weighted_pearson(x, y, drawn[:, labels].astype(np.float64))
        if np.isfinite(found).any():
            low, high = np.nanpercentile(found, [2.5, 97.5])
            interval = (float(low), float(high))
    ones = np.ones((1, x.size))
    return Correlation(
        pearson=float(_weighted_pearson(x, y, ones)[0]),
        spearman=float(_weighted_pearson(_ranks(x), _ranks(y), ones)[0]),
        interval=interval,
        n=int(x.size),
    )


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation alone; NaN where one of the two does not vary."""
    return float(_weighted_pearson(x, y, np.ones((1, x.size)))[0])


def without_trend(values: np.ndarray) -> np.ndarray:
    """Values, in order of depth, less their straight line over depth."""
    depth = np.arange(len(values), dtype=np.float64)
    return values - np.polyval(np.polyfit(depth, values, 1), depth)


def _weighted_pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One correlation for each row of weights, ``(k, n)``; NaN without variance."""
    if x.size < 2:
        return np.full(len(weights), np.nan)
    # Only the mean of all points is taken off first: it keeps the sums from cancelling.
    x, y = (v - v.mean() for v in (x, y))
    spread = [np.abs(v).max() for v in (x, y)]
    if not min(spread) > 0:
        return np.full(len(weights), np.nan)
    x, y = x / spread[0], y / spread[1]
    total = weights.sum(1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    xx = weights @ (x * x) / total - mean_x**2
    yy = weights @ (y * y) / total - mean_y**2
    xy = weights @ (x * y) / total - mean_x * mean_y
    product = np.maximum(xx, 0) * np.maximum(yy, 0)
    is_flat = product <= 1e-24
    safe = np.sqrt(np.where(is_flat, 1.0, product))
    return np.where(is_flat, np.nan, np.clip(xy / safe, -1, 1))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
