"""How two adapters agree on one matrix, and what follows for merging them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_dora.analyze.guidance import AGREE, OVERLAP, Advice
from mlx_dora.analyze.metrics import number


@dataclass(frozen=True, kw_only=True)
class PairAgreement:
    """Two adapters on one matrix.

    Attributes:
        name: Full path of the module.
        first: Index of one adapter.
        second: Index of the other.
        update_cosine: Cosine of the updates s·BA as wholes.
        row_update_cosine: Of each row; 0 where a row is not updated. Shape ``(out,)``.
        direction_cosine: Mean cosine of the adapted rows, the sign of m included.
        delta_m_correlation: Pearson's of the two Δm over rows.
        sign_conflict: Share of the product of both Δm that is in rows where one
            grows what the other shrinks.
        size_ratio: Frobenius norm of the second update over the first's.
        input_overlap: Mean squared cosine of the principal angles of the directions
            the updates read.
        output_overlap: The same of the directions they write.
        disturbs_first: The second's output over the first's own, on the first's inputs.
        disturbs_second: The first's output over the second's own, on the second's.
        energy: Product of the two updates' norms: the weight in means.
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
        """JSON values, rows as quantiles."""
        plain = {
            key: number(value) if isinstance(value, float) else value
            for key, value in vars(self).items()
            if key != "row_update_cosine"
        }
        cuts = (0.05, 0.25, 0.5, 0.75, 0.95)
        found = [float(v) for v in np.quantile(self.row_update_cosine, cuts)]
        return {**plain, "row_update_cosine": {"at": list(cuts), "values": found}}


def mean_agreement(pairs: Sequence[PairAgreement], measure: str) -> float:
    """A measure over matrices, weighted by the energy of the two updates."""
    weights = np.array([one.energy for one in pairs])
    values = np.array([getattr(one, measure) for one in pairs], np.float64)
    total = weights.sum()
    return (
        float((weights * values).sum() / total) if total > 0 else float(values.mean())
    )


def comparison_advice(
    pairs: Sequence[PairAgreement], count: int, rank: int
) -> list[Advice]:
    """Rules on the energy-weighted means over matrices and pairs."""
    cosine = mean_agreement(pairs, "update_cosine")
    reads = mean_agreement(pairs, "input_overlap")
    writes = mean_agreement(pairs, "output_overlap")
    conflict = mean_agreement(pairs, "sign_conflict")
    mean = "slerp" if count == 2 else "karcher"
    equal = tuple(round(1 / count, 4) for _ in range(count))
    found = []
    if cosine >= AGREE:
        found.append(
            Advice(
                rule="agree",
                method=mean,
                weights=equal,
                sentence=f"The updates agree (cosine {cosine:+.2f}): a mean of the "
                f"directions, {mean} with equal weights, keeps what they share.",
            )
        )
    elif cosine <= -AGREE:
        found.append(
            Advice(
                rule="opposed",
                sentence=f"The updates oppose each other (cosine {cosine:+.2f}): any "
                "mean cancels what they learnt. Keep them apart, or weigh one well "
                "above the other.",
            )
        )
    elif min(reads, writes) < OVERLAP:
        found.append(
            Advice(
                rule="independent",
                method="task_arithmetic",
                weights=(1.0,) * count,
                sentence=f"The updates use different directions (cosine {cosine:+.2f}, "
                f"overlap of what they read {reads:.2f}, of what they write "
                f"{writes:.2f}): their sum, task_arithmetic with weights 1, keeps each "
                f"whole, while a mean leaves 1/{count} of each.",
            )
        )
    else:
        found.append(
            Advice(
                rule="entangled",
                method="ties",
                weights=equal,
                sentence="The updates use the same directions (overlap "
                f"{reads:.2f} and {writes:.2f}) for different things (cosine "
                f"{cosine:+.2f}): expect losses. "
                "ties settles entries whose signs differ; test what it gives.",
            )
        )
    if conflict > 0.5:
        found.append(
            Advice(
                rule="magnitudes",
                sentence=f"{conflict:.0%} of the magnitude changes have opposite "
                "signs: averaged magnitudes fall back to the base's.",
            )
        )
    if rank:
        found.append(
            Advice(
                rule="rank",
                rank=rank,
                sentence=f"Rank {rank} holds 99% of the energy of the updates put "
                "together, in every matrix.",
            )
        )
    return found
