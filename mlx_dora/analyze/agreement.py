"""Measures how two adapters agree on a matrix, and advises how to merge them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_dora.analyze.guidance import AGREE, OVERLAP, Advice
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
    """Return advice from the energy-weighted means over matrices and pairs.

    Args:
        pairs: Agreement of each pair of adapters on each matrix.
        names: Short names of the adapters.
        rank: Rank that holds the updates together in every matrix; 0 if unknown.
    """
    advice = [_method_advice(pairs, len(names)), *_groups_advice(pairs, names)]
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
    return advice


def _groups_advice(
    pairs: Sequence[PairAgreement], names: Sequence[str]
) -> list[Advice]:
    """Name the adapters that agree, if not all pairs are of the same kind."""
    cosines = pair_cosines(pairs)
    kinds = {(c >= AGREE) - (c <= -AGREE) for c in cosines.values()}
    if len(kinds) < 2:
        return []
    groups = [{i} for i in range(len(names))]
    for (first, second), cosine in cosines.items():
        if cosine >= AGREE:
            both = [g for g in groups if first in g or second in g]
            groups = [g for g in groups if g not in both] + [set[int]().union(*both)]
    listed = [" with ".join(names[i] for i in sorted(g)) for g in groups]
    extremes = [end(cosines, key=cosines.__getitem__) for end in (min, max)]
    ends = (
        f"{names[a]} and {names[b]} have cosine {cosines[a, b]:+.2f}"
        for a, b in extremes
    )
    return [
        Advice(
            rule="groups",
            sentence=f"The pairs differ: {', '.join(ends)}. Groups that agree "
            f"(cosine at least {AGREE}): {'; '.join(sorted(listed))}. Compare and "
            "merge within a group first.",
        )
    ]


def _method_advice(pairs: Sequence[PairAgreement], count: int) -> Advice:
    """Suggest a merge method from the cosines and subspace overlaps."""
    cosine = mean_agreement(pairs, "update_cosine")
    reads = mean_agreement(pairs, "input_overlap")
    writes = mean_agreement(pairs, "output_overlap")
    each = pair_cosines(pairs).values()
    size = f"cosine {cosine:+.2f}"
    if len(each) > 1:
        size = f"mean cosine {cosine:+.2f}, from {min(each):+.2f} to {max(each):+.2f}"
    mean = "slerp" if count == 2 else "karcher"
    equal = tuple(round(1 / count, 4) for _ in range(count))
    if cosine >= AGREE:
        return Advice(
            rule="agree",
            method=mean,
            weights=equal,
            sentence=f"The updates agree ({size}): a mean of the "
            f"directions, {mean} with equal weights, keeps what they share.",
        )
    if cosine <= -AGREE:
        return Advice(
            rule="opposed",
            sentence=f"The updates oppose each other ({size}): any "
            "mean cancels what they learned. Keep them apart, or give one a much "
            "larger weight than the other.",
        )
    if min(reads, writes) < OVERLAP:
        return Advice(
            rule="independent",
            method="task_arithmetic",
            weights=(1.0,) * count,
            sentence=f"The updates use different directions ({size}; "
            f"overlap of what they read {reads:.2f}, of what they write "
            f"{writes:.2f}): their sum, task_arithmetic with weights 1, keeps each "
            f"whole, while a mean leaves 1/{count} of each.",
        )
    return Advice(
        rule="entangled",
        method="ties",
        weights=equal,
        sentence="The updates use the same directions (overlap "
        f"{reads:.2f} and {writes:.2f}) for different things "
        f"({size}): expect losses. "
        "ties settles entries whose signs differ; test the result.",
    )
