"""Rules that turn measures into advice: each stated, each with its reason."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_dora.analyze.metrics import MatrixAnalysis
from mlx_dora.errors import DoRAError

ENERGY = 0.99
"""Share of the update's energy that a suggested rank keeps."""
AGREE = 0.2
"""Cosine of two updates from which they count as agreeing, or opposed if negative."""
OVERLAP = 0.2
"""Share of a subspace from which two updates count as using the same directions."""
SMALL_PART = 0.05
"""Share of the squared change under which one of its two parts hardly matters."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One suggestion.

    Attributes:
        rule: Short name of the rule.
        sentence: What is suggested and why, with the numbers.
        method: Merge method of ``mlx_dora.merge`` it suggests, if any.
        weights: Weights it suggests, if any.
        rank: Rank it suggests, if any.
    """

    rule: str
    sentence: str
    method: str | None = None
    weights: tuple[float, ...] | None = None
    rank: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def adaptation_advice(layers: Sequence[MatrixAnalysis]) -> list[Advice]:
    """What one adaptation's numbers suggest for merging and for its rank."""
    moved = [one for one in layers if one.classification != "minimal"]
    if not moved:
        return [
            Advice(
                rule="unchanged",
                sentence="Hardly any row moved by more than a thousandth: this is the "
                "base, and any merge would only thin the other inputs.",
            )
        ]
    found = []
    radial = float(np.mean([one.radial_share for one in moved]))
    if radial < SMALL_PART:
        found.append(
            Advice(
                rule="direction",
                method="slerp",
                sentence=f"{radial:.1%} of the squared change is magnitude: merge by "
                "direction (slerp, karcher or nmean), whose mean keeps row lengths.",
            )
        )
    elif radial > 1 - SMALL_PART:
        found.append(
            Advice(
                rule="magnitude",
                method="linear",
                sentence=f"{radial:.1%} of the squared change is magnitude and the "
                "directions stay: a linear merge is enough.",
            )
        )
    else:
        found.append(
            Advice(
                rule="both",
                method="slerp",
                sentence=f"{radial:.1%} of the squared change is magnitude, the rest "
                "direction: merge the two apart, as slerp, karcher and nmean do.",
            )
        )
    needed = max(one.rank_holding(ENERGY) for one in moved)
    used = max((one.rank or 0 for one in moved), default=0)
    if used and needed < used:
        found.append(
            Advice(
                rule="rank",
                rank=needed,
                sentence=f"Rank {needed} keeps {ENERGY:.0%} of every update's energy; "
                f"the adapter has {used}.",
            )
        )
    elif used:
        found.append(
            Advice(
                rule="rank",
                rank=used,
                sentence=f"At least one matrix needs all its rank {used} for "
                f"{ENERGY:.0%} of its energy: a lower rank would cost, a higher one "
                "may help.",
            )
        )
    return found


def rank_pattern(layers: Sequence[MatrixAnalysis], budget: float) -> dict[str, int]:
    """Ranks that keep the most energy at a given mean rank a matrix.

    Each update's singular directions compete by their share of their own matrix's
    energy, the best first; every matrix keeps at least one. The experts of a module
    have one rank: their mean shares compete, and each rank counts once an expert.

    Args:
        layers: The analysed matrices.
        budget: Mean rank, at least 1.

    Returns:
        Path to rank, for `DoRAConfig.rank_pattern`.

    Raises:
        DoRAError: If the budget is under 1.
    """
    if not budget >= 1:
        raise DoRAError(f"a rank budget must be at least 1 a matrix, got {budget}.")
    shares: dict[str, list[np.ndarray]] = {}
    for one in layers:
        energy = np.square(one.singular_values)
        total = energy.sum()
        shares.setdefault(one.path, []).append(energy / total if total > 0 else energy)
    ranks = dict.fromkeys(shares, 1)
    left = int(budget * len(layers)) - len(layers)
    offers = []
    for path, stack in shares.items():
        # What is rounding gets no rank.
        offers += [(e, path) for e in np.mean(stack, axis=0)[1:] if e > 1e-12]
    for _, path in sorted(offers, reverse=True):
        if len(shares[path]) <= left:
            ranks[path] += 1
            left -= len(shares[path])
    return ranks
