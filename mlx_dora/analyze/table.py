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
COMPARISON_LEGEND = (
    "cosine: of the two updates; +1 agree, 0 unrelated, -1 opposed",
    "reads, writes: overlap of their input and output directions, 0 to 1",
    "signs: share of the magnitude changes (Δm) that have equal signs",
    "disturbs: output of the other update on an adapter's inputs, relative to its own",
)


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
    lines = [
        f"{left} of {total} matrices are equal in both models and left out."
    ] * bool(left)
    if not analysis.layers:
        return lines + advice_lines(analysis.guidance)
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
    lines += [
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
    """Return lines with the adapters, cosines, conflicts and guidance.

    Args:
        comparison: The comparison to show.
        top: Greatest number of pairs to show, most opposed first; None for all.
    """
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
    lines.append(f"{'':{width}} pair cosine reads writes signs    disturbs")
    lines += [
        f"{pair.name:{width}} {f'{pair.first + 1}-{pair.second + 1}':4} "
        f"{pair.update_cosine:+6.2f} {pair.input_overlap:5.2f} "
        f"{pair.output_overlap:6.2f} {1 - pair.sign_conflict:5.0%} "
        f"{pair.disturbs_first:5.2f} {pair.disturbs_second:5.2f}"
        for pair in pairs
    ]
    if len(pairs) < len(comparison.pairs):
        more = len(comparison.pairs) - len(pairs)
        lines.append(f"and {more} rows more, which conflict less (--all shows them)")
    lines += COMPARISON_LEGEND
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
