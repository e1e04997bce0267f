"""Measures how two adapters agree on a matrix, and advises how to merge them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlx_dora.analyze.guidance import (
    AGREE,
    INDEPENDENT,
    OPPOSE,
    SPACE,
    STRONG,
    Advice,
)
from mlx_dora.analyze.metrics import number


@dataclass(frozen=True, kw_only=True)
class PairAgreement:
    """Agreement of two adapters on one matrix.

    Attributes:
        name: Full path of the module.
        first: Index of the first adapter.
        second: Index of the second adapter.
        update_cosine: Cosine of the whole updates s·BA.
        row_update_cosine: Cosine of each row of the updates; 0 where a row is not
            updated. Shape ``(out,)``.
        direction_cosine: Mean cosine of the adapted rows, including the sign of m.
        delta_m_correlation: Pearson correlation of the two Δm over rows.
        sign_conflict: Share of the product of both Δm that lies in rows where the two
            have opposite signs.
        size_ratio: Frobenius norm of the second update, divided by the first's.
        relative_size: Geometric mean of the norms of both updates, divided by ‖W0‖.
        input_overlap: Mean squared cosine of the principal angles between the input
            directions of the updates.
        output_overlap: Mean squared cosine of the principal angles between their output
            directions.
        disturbs_first: Size of the second update's output relative to the first's, on
            the first's inputs.
        disturbs_second: Size of the first update's output relative to the second's, on
            the second's inputs.
        energy: Product of the norms of the two updates; the weight in means.
    """

    name: str
    first: int
    second: int
    update_cosine: float
    row_update_cosine: np.ndarray = field(repr=False)
    direction_cosine: float
    delta_m_correlation: float
    sign_conflict: float
    size_ratio: float
    relative_size: float
    input_overlap: float
    output_overlap: float
    disturbs_first: float
    disturbs_second: float
    energy: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with rows as quantiles."""
        plain = {
            key: number(value) if isinstance(value, float) else value
            for key, value in vars(self).items()
            if key != "row_update_cosine"
        }
        cuts = (0.05, 0.25, 0.5, 0.75, 0.95)
        quantiles = [float(v) for v in np.quantile(self.row_update_cosine, cuts)]
        return {**plain, "row_update_cosine": {"at": list(cuts), "values": quantiles}}


def mean_agreement(pairs: Sequence[PairAgreement], measure: str) -> float:
    """Return the mean of a measure over matrices, weighted by energy."""
    weights = np.array([pair.energy for pair in pairs])
    values = np.array([getattr(pair, measure) for pair in pairs], np.float64)
    total = weights.sum()
    return (
        float((weights * values).sum() / total) if total > 0 else float(values.mean())
    )


def pair_cosines(pairs: Sequence[PairAgreement]) -> dict[tuple[int, int], float]:
    """Return the energy-weighted mean cosine of the updates of each pair."""
    own: dict[tuple[int, int], list[PairAgreement]] = {}
    for pair in pairs:
        own.setdefault((pair.first, pair.second), []).append(pair)
    return {key: mean_agreement(all_, "update_cosine") for key, all_ in own.items()}


def comparison_advice(
    pairs: Sequence[PairAgreement], names: Sequence[str], rank: int
) -> list[Advice]:
    """Return advice from the energy-weighted means over matrices of each pair.

    Args:
        pairs: Agreement of each pair of adapters on each matrix.
        names: Short names of the adapters.
        rank: Rank that holds the updates together in every matrix; 0 if unknown.
    """
    advice = [_method_advice(pairs, names)]
    conflict = mean_agreement(pairs, "sign_conflict")
    if conflict > 0.5:
        advice.append(
            Advice(
                rule="magnitudes",
                sentence=f"{conflict:.0%} of the magnitude changes have opposite "
                "signs: averaged magnitudes fall back to the base's.",
            )
        )
    if rank:
        advice.append(
            Advice(
                rule="rank",
                rank=rank,
                sentence=f"Rank {rank} holds 99% of the energy of the updates put "
                "together, in every matrix.",
            )
        )
    if advice[0].method is not None:
        advice.append(
            Advice(
                rule="test",
                sentence="Updates alone do not show whether a task ends up worse than "
                "with the base: measure it (mlx_dora.evaluate), or let "
                "mlx_dora.merge --method auto --data choose by it.",
            )
        )
    return advice


def groups_that_agree(
    cosines: Mapping[tuple[int, int], float], count: int
) -> list[list[int]]:
    """Group adapters: pairs with a cosine of at least `AGREE` share a group.

    Groups join through a common member.

    Args:
        cosines: Mean cosine of each pair that shares a matrix.
        count: Number of adapters.

    Returns:
        The indices of each group in order, by their first member.
    """
    groups = [{i} for i in range(count)]
    for (first, second), cosine in cosines.items():
        if cosine >= AGREE:
            both = [g for g in groups if first in g or second in g]
            groups = [g for g in groups if g not in both] + [set[int]().union(*both)]
    return sorted(sorted(group) for group in groups)


def _method_advice(pairs: Sequence[PairAgreement], names: Sequence[str]) -> Advice:
    """Suggest a merge method from the cosines of the pairs.

    The benchmark of ``docs/merging.md`` is behind the method, its weights and the
    limits.
    """
    cosines = pair_cosines(pairs)
    least, most = (end(cosines, key=cosines.__getitem__) for end in (min, max))
    said = {pair: f"cosine {cosine:+.2f}" for pair, cosine in cosines.items()}
    size = said[least]
    if len(cosines) > 1:
        size = (
            f"{names[least[0]]} and {names[least[1]]} have {said[least]}, "
            f"{names[most[0]]} and {names[most[1]]} {said[most]}"
        )
    if cosines[least] <= OPPOSE:
        return Advice(
            rule="opposed",
            sentence=f"The updates of {names[least[0]]} and {names[least[1]]} oppose "
            f"each other ({said[least]}): any mean cancels what they learned. Keep "
            "them apart, or give one a much larger weight than the other.",
        )
    mean = Advice(
        rule="agree",
        method="slerp" if len(names) == 2 else "karcher",
        weights=tuple(round(1 / len(names), 4) for _ in names),
        sentence="",
    )
    groups = groups_that_agree(cosines, len(names))
    if len(groups) == 1:
        return replace(
            mean,
            sentence=f"The updates agree ({size}): a mean of the directions, "
            f"{mean.method} with equal weights, keeps what they share.",
        )
    strength = mean_agreement(pairs, "relative_size")
    if strength >= STRONG:
        return replace(
            mean,
            rule="strong",
            sentence=f"The updates do different things ({size}) and are large "
            f"({strength:.1%} of the weights): a mean, {mean.method} with equal "
            "weights, loses less than a sum, in which each disturbs the others.",
        )
    suggestion = (
        f"{INDEPENDENT} in space {SPACE} with weights 1 keeps each whole and makes "
        "their directions orthogonal, so that they disturb each other little."
    )
    if len(groups) == len(names):
        rule, seen = "independent", f"The updates do different things ({size})"
    else:
        listed = "; ".join(" with ".join(names[i] for i in g) for g in groups)
        rule = "groups"
        seen = (
            f"The pairs differ: {size}. Groups that agree (cosine at least {AGREE}): "
            f"{listed}"
        )
    return Advice(
        rule=rule,
        method=INDEPENDENT,
        weights=(1.0,) * len(names),
        space=SPACE,
        sentence=f"{seen}: {suggestion}",
    )
