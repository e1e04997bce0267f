"""Rules that turn measures into advice, each with its reason."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_dora.analyze.metrics import MatrixAnalysis
from mlx_dora.errors import DoRAError

ENERGY = 0.99
"""Share of the update's energy that a suggested rank keeps."""
AGREE = 0.5
"""Least cosine at which two updates agree."""
OPPOSE = -0.2
"""Greatest cosine at which two updates oppose each other."""
STRONG = 0.02
"""Least size of updates, relative to the weights, at which sums of them do harm."""
INDEPENDENT, SPACE = "tsv", "core"
"""Suggested method, and its space, for updates that neither agree nor oppose."""
SMALL_PART = 0.05
"""Share of the squared change below which a part (magnitude, direction) is minor."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A suggestion.

    Attributes:
        rule: Short name of the rule.
        sentence: The suggestion and its reason, with numbers.
        method: Suggested method of ``mlx_dora.merge``, or None.
        weights: Suggested weights, or None.
        space: Suggested space to merge in, or None for the method's own.
        rank: Suggested rank, or None.
    """

    rule: str
    sentence: str
    method: str | None = None
    weights: tuple[float, ...] | None = None
    space: str | None = None
    rank: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def adaptation_advice(layers: Sequence[MatrixAnalysis]) -> list[Advice]:
    """Return advice on merging an adaptation and on its rank."""
    moved = _moved(layers)
    if not moved:
        return [
            Advice(
                rule="unchanged",
                sentence="Hardly any row changed by more than a thousandth: this is "
                "practically the base, and merging it only weakens the other inputs.",
            )
        ]
    radial = radial_share(layers)
    assert radial is not None
    advice = [_method_advice(radial)]
    needed = max(layer.rank_holding(ENERGY) for layer in moved)
    used = max((layer.rank or 0 for layer in moved), default=0)
    if used and needed < used:
        advice.append(
            Advice(
                rule="rank",
                rank=needed,
                sentence=f"Rank {needed} keeps {ENERGY:.0%} of every update's energy; "
                f"the adapter has {used}.",
            )
        )
    elif used:
        advice.append(
            Advice(
                rule="rank",
                rank=used,
                sentence=f"At least one matrix needs all its rank {used} for "
                f"{ENERGY:.0%} of its energy: a lower rank would cost, a higher one "
                "may help.",
            )
        )
    return advice


def _method_advice(radial: float) -> Advice:
    """Return advice on the method of a merge from magnitude's share of the change."""
    share = f"{radial:.1%} of the squared change is magnitude"
    if radial < SMALL_PART:
        return Advice(
            rule="direction",
            method="slerp",
            sentence=f"{share}: merge by direction (slerp, karcher or nmean), whose "
            "mean keeps row lengths.",
        )
    if radial > 1 - SMALL_PART:
        return Advice(
            rule="magnitude",
            method="linear",
            sentence=f"{share} and the directions stay: a linear merge is enough.",
        )
    return Advice(
        rule="both",
        method="slerp",
        sentence=f"{share}, the rest direction: merge the two separately, as slerp, "
        "karcher and nmean do.",
    )


def radial_share(layers: Sequence[MatrixAnalysis]) -> float | None:
    """Return magnitude's mean share of the squared change, over matrices that moved.

    None if every matrix is minimal.
    """
    shares = [layer.radial_share for layer in _moved(layers)]
    return float(np.mean(shares)) if shares else None


def _moved(layers: Sequence[MatrixAnalysis]) -> list[MatrixAnalysis]:
    return [layer for layer in layers if layer.classification != "minimal"]


def rank_pattern(layers: Sequence[MatrixAnalysis], budget: float) -> dict[str, int]:
    """Return the ranks that keep the most energy at a given mean rank per matrix.

    Singular directions are ranked by their share of the energy of their own matrix.
    Every matrix keeps at least one direction. The experts of a module share a rank:
    their mean shares are used, and each rank counts once per expert.

    Args:
        layers: The analyzed matrices.
        budget: Mean rank, at least 1.

    Returns:
        Map from path to rank, for `DoRAConfig.rank_pattern`.

    Raises:
        DoRAError: If the budget is below 1.
    """
    if not budget >= 1:
        raise DoRAError(f"a rank budget must be at least 1 per matrix, got {budget}.")
    shares: dict[str, list[np.ndarray]] = {}
    for layer in layers:
        energy = np.square(layer.singular_values)
        total = energy.sum()
        shares.setdefault(layer.path, []).append(
            energy / total if total > 0 else energy
        )
    ranks = dict.fromkeys(shares, 1)
    left = int(budget * len(layers)) - len(layers)
    offers = []
    for path, stack in shares.items():
        # Shares at rounding level get no rank.
        offers += [(e, path) for e in np.mean(stack, axis=0)[1:] if e > 1e-12]
    for _, path in sorted(offers, reverse=True):
        if len(shares[path]) <= left:
            ranks[path] += 1
            left -= len(shares[path])
    return ranks
