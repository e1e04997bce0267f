"""Correlations with a confidence interval and the number of points."""

from dataclasses import dataclass

import numpy as np

_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Correlation of two quantities; NaN if either is constant.

    Attributes:
        pearson: Correlation of the values.
        spearman: Correlation of their ranks; tied values share a rank.
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
    """Return Pearson and Spearman correlations with a bootstrap interval.

    Args:
        x: Values. Shape ``(n,)``.
        y: Values. Shape ``(n,)``.
        groups: Group number of each point, shape ``(n,)``. Points that are not
            independent (checkpoints of one layer) share a group, and whole groups are
            resampled.
        seed: Random seed for resampling.

    Returns:
        The correlation. With fewer than three groups or points, the interval is NaN.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    labels = np.arange(x.size)
    if groups is not None:
        labels = np.unique(groups, return_inverse=True)[1]
    size = int(labels.max(initial=-1)) + 1
    interval = (np.nan, np.nan)
    if size >= 3:
        # The weight of a point is how often its group was drawn.
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(size, np.full(size, 1 / size), _RESAMPLES)
        samples = _weighted_pearson(x, y, drawn[:, labels].astype(np.float64))
        if np.isfinite(samples).any():
            low, high = np.nanpercentile(samples, [2.5, 97.5])
            interval = (float(low), float(high))
    ones = np.ones((1, x.size))
    return Correlation(
        pearson=float(_weighted_pearson(x, y, ones)[0]),
        spearman=float(_weighted_pearson(_ranks(x), _ranks(y), ones)[0]),
        interval=interval,
        n=int(x.size),
    )


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return the Pearson correlation; NaN if either quantity is constant."""
    return float(_weighted_pearson(x, y, np.ones((1, x.size)))[0])


def without_trend(values: np.ndarray) -> np.ndarray:
    """Subtract the linear trend over depth from values in order of depth."""
    depth = np.arange(len(values), dtype=np.float64)
    return values - np.polyval(np.polyfit(depth, values, 1), depth)


def _weighted_pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return a correlation per row of weights, ``(k, n)``; NaN without variance."""
    if x.size < 2:
        return np.full(len(weights), np.nan)
    # Subtract the mean of all points first, so that the sums do not cancel.
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
