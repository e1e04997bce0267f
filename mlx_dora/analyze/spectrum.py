"""Measures of a spectrum: how many directions an update really uses."""

import numpy as np


def effective_rank(values: np.ndarray) -> float:
    """Exponential of the entropy of the energy over singular directions; 0 of zero."""
    energy = np.square(values)
    if not energy.sum() > 0:
        return 0.0
    share = energy[energy > 0] / energy.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def rank_holding(values: np.ndarray, share: float) -> int:
    """The fewest leading directions that hold this share of the energy; 0 of zero."""
    energy = np.cumsum(np.square(values))
    if not energy.size or not energy[-1] > 0:
        return 0
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12)) + 1)
