"""Measures of a spectrum: how many directions an update effectively uses."""

import numpy as np


def effective_rank(values: np.ndarray) -> float:
    """Return exp of the entropy of the energy over directions; 0 for a zero matrix."""
    energy = np.square(values)
    if not energy.sum() > 0:
        return 0.0
    share = energy[energy > 0] / energy.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def rank_holding(values: np.ndarray, share: float) -> int:
    """Return how many leading directions hold this share of the energy; 0 if zero."""
    energy = np.cumsum(np.square(values))
    if not energy.size or not energy[-1] > 0:
        return 0
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12)) + 1)
