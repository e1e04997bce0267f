"""Formats an analysis as a few lines for a terminal."""

from collections.abc import Sequence

import numpy as np

from mlx_dora.analyze.compare import AdapterComparison
from mlx_dora.analyze.guidance import Advice
from mlx_dora.analyze.metrics import MatrixAnalysis
from mlx_dora.analyze.result import AdaptationAnalysis
from mlx_dora.analyze.statistics import Correlation

BY = ("matrix", "layer", "module", "expert")
"""Choices for grouping lines of the table; ``matrix`` combines a module's experts."""


def analysis_lines(
    analysis: AdaptationAnalysis, *, by: str = "matrix", top: int | None = None
) -> list[str]:
    """Return the table, largest ΔD first, with the correlation and the guidance.

    Args:
        analysis: The analysis to show.
        by: Grouping, one of `BY`. All groups but experts show means over matrices.
        top: Greatest number of lines to show; None for all.
    """
    left = len(analysis.unchanged)
    total = len(analysis.layers) + left
    unchanged = [f"{left} of {total} matrices are equal in both models and left out."]
    lines = unchanged if left else []
    if not analysis.layers:
        return lines + advice_lines(analysis.guidance)
    return lines + _matrix_lines(analysis, by, top)


def _matrix_lines(analysis: AdaptationAnalysis, by: str, top: int | None) -> list[str]:
    groups: dict[str, list[MatrixAnalysis]] = {}
    for matrix in analysis.layers:
        keys = {
            "layer": f"layer {matrix.layer}",
            "module": matrix.module,
            "matrix": matrix.path,
        }
        key = keys.get(by, matrix.name)
        groups.setdefault("no layer" if key == "layer None" else key, []).append(matrix)
    rows = sorted(groups.items(), key=lambda item: -_mean(item[1], "delta_d"))
    shown = rows[:top]
    width = max(len(name) for name, _ in shown)
    lines = [
        f"{'':{width}}  {'ΔM':>10}  {'ΔM rel.':>8}  {'ΔD':>10}  {'angle':>8}  "
        f"{'eff. rank':>9}  kind"
    ]
    for name, members in shown:
        angle = np.degrees(np.mean([matrix.row_angle.mean() for matrix in members]))
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
    """Return lines with the adapters, cosines, conflicts and guidance."""
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
    pairs = sorted(comparison.pairs, key=lambda pair: pair.update_cosine)[:top]
    width = max(len(pair.name) for pair in pairs)
    lines.append(
        f"{'':{width}}  pair  {'cosine':>7}  {'reads':>6}  {'writes':>6}  "
        f"{'Δm signs':>8}  disturbance"
    )
    lines += [
        f"{pair.name:{width}}  {pair.first + 1}-{pair.second + 1:<3} "
        f"{pair.update_cosine:+7.3f}  {pair.input_overlap:6.3f}  "
        f"{pair.output_overlap:6.3f}  {1 - pair.sign_conflict:8.1%}  "
        f"{pair.disturbs_first:.3f} {pair.disturbs_second:.3f}"
        for pair in pairs
    ]
    if len(pairs) < len(comparison.pairs):
        lines.append(f"and {len(comparison.pairs) - len(pairs)} more")
    return lines + advice_lines(comparison.guidance)


def describe(correlation: Correlation) -> str:
    """Return a correlation in words."""
    if not np.isfinite(correlation.pearson):
        return f"not defined ({correlation.n} points, or one quantity is constant)"
    low, high = correlation.interval
    return (
        f"Pearson {correlation.pearson:+.2f} [{low:+.2f}, {high:+.2f}], Spearman "
        f"{correlation.spearman:+.2f}, n {correlation.n}"
    )


def advice_lines(guidance: Sequence[Advice]) -> list[str]:
    """Return the guidance, one line each."""
    return [f"- {advice.sentence}" for advice in guidance]


def _mean(members: Sequence[MatrixAnalysis], measure: str) -> float:
    return float(np.mean([getattr(member, measure) for member in members]))


def _kind(members: Sequence[MatrixAnalysis]) -> str:
    kinds = [member.classification for member in members]
    return max(sorted(set(kinds)), key=kinds.count)
