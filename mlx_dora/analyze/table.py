"""An analysis as a few lines for a terminal."""

from collections.abc import Sequence

import numpy as np

from mlx_dora.analyze.compare import AdapterComparison
from mlx_dora.analyze.guidance import Advice
from mlx_dora.analyze.metrics import MatrixAnalysis
from mlx_dora.analyze.result import AdaptationAnalysis
from mlx_dora.analyze.statistics import Correlation

BY = ("matrix", "layer", "module", "expert")
"""What a line of the table stands for; ``matrix`` takes the experts of one together."""


def analysis_lines(
    analysis: AdaptationAnalysis, *, by: str = "matrix", top: int | None = None
) -> list[str]:
    """The table, the most turned first, with the correlation and the guidance.

    Args:
        analysis: What to show.
        by: One of `BY`; all but experts show means over their matrices.
        top: Show only this many lines.
    """
    groups: dict[str, list[MatrixAnalysis]] = {}
    for one in analysis.layers:
        keys = {"layer": f"layer {one.layer}", "module": one.module, "matrix": one.path}
        key = keys.get(by, one.name)
        groups.setdefault("no layer" if key == "layer None" else key, []).append(one)
    rows = sorted(groups.items(), key=lambda item: -_mean(item[1], "delta_d"))
    shown = rows[:top]
    width = max(len(name) for name, _ in shown)
    lines = [
        f"{'':{width}}  {'ΔM':>10}  {'ΔM rel.':>8}  {'ΔD':>10}  {'angle':>8}  "
        f"{'eff. rank':>9}  kind"
    ]
    for name, members in shown:
        angle = np.degrees(np.mean([one.row_angle.mean() for one in members]))
        rank = _mean(members, "effective_rank")
        lines.append(
            f"{name:{width}}  {_mean(members, 'delta_m'):10.3e}  "
            f"{_mean(members, 'delta_m_relative'):8.3%}  "
            f"{_mean(members, 'delta_d'):10.3e}  {angle:7.3f}°  "
            f"{f'{rank:.1f}' if rank else '-':>9}  {_kind(members)}"
        )
    if len(shown) < len(rows):
        lines.append(f"and {len(rows) - len(shown)} more")
    lines.append(f"ΔM with ΔD over matrices: {describe(analysis.association)}")
    return lines + advice_lines(analysis.guidance)


def comparison_lines(
    comparison: AdapterComparison, *, top: int | None = None
) -> list[str]:
    """Adapters by number, their cosines, where they conflict, and the guidance."""
    count = len(comparison.adapters)
    lines = [f"{i + 1}: {name}" for i, name in enumerate(comparison.adapters)]
    matrix = comparison.matrix()
    lines += [
        "cosine of the updates",
        "   " + "".join(f"{i + 1:8}" for i in range(count)),
    ]
    lines += [
        f"{i + 1:3}" + "".join(f"{value:+8.3f}" for value in matrix[i])
        for i in range(count)
    ]
    pairs = sorted(comparison.pairs, key=lambda one: one.update_cosine)[:top]
    width = max(len(one.name) for one in pairs)
    lines.append(
        f"{'':{width}}  pair  {'cosine':>7}  {'reads':>6}  {'writes':>6}  "
        f"{'Δm signs':>8}  disturbance"
    )
    lines += [
        f"{one.name:{width}}  {one.first + 1}-{one.second + 1:<3} "
        f"{one.update_cosine:+7.3f}  {one.input_overlap:6.3f}  "
        f"{one.output_overlap:6.3f}  {1 - one.sign_conflict:8.1%}  "
        f"{one.disturbs_first:.3f} {one.disturbs_second:.3f}"
        for one in pairs
    ]
    if len(pairs) < len(comparison.pairs):
        lines.append(f"and {len(comparison.pairs) - len(pairs)} more")
    return lines + advice_lines(comparison.guidance)


def describe(found: Correlation) -> str:
    """A correlation in words."""
    if not np.isfinite(found.pearson):
        return f"not defined ({found.n} points, or one of them does not vary)"
    low, high = found.interval
    return (
        f"Pearson {found.pearson:+.2f} [{low:+.2f}, {high:+.2f}], Spearman "
        f"{found.spearman:+.2f}, n {found.n}"
    )


def advice_lines(guidance: Sequence[Advice]) -> list[str]:
    """The guidance, a line each."""
    return [f"- {one.sentence}" for one in guidance]


def _mean(members: Sequence[MatrixAnalysis], measure: str) -> float:
    return float(np.mean([getattr(one, measure) for one in members]))


def _kind(members: Sequence[MatrixAnalysis]) -> str:
    kinds = [one.classification for one in members]
    return max(sorted(set(kinds)), key=kinds.count)
