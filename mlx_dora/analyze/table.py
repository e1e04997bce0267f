"""Formats an analysis as a few lines for a terminal."""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from mlx_dora.analyze.compare import AdapterComparison
from mlx_dora.analyze.guidance import Advice
from mlx_dora.analyze.metrics import MatrixAnalysis
from mlx_dora.analyze.result import AdaptationAnalysis
from mlx_dora.analyze.statistics import Correlation

BY = ("matrix", "layer", "module", "expert")
"""Choices for grouping lines of the table; ``matrix`` combines a module's experts."""


ANALYSIS_LEGEND = [
    "ΔM: mean change of a row's length; rel.: relative to the base's row.",
    "ΔD: mean of 1 - cosine between a row and its base; angle: between the same.",
    "rank: effective rank of the update; kind: what most rows did.",
    "Pearson and Spearman: correlation of ΔM with ΔD, -1 to 1, with its 95 % interval.",
]
COMPARISON_LEGEND = [
    "cosine: of the updates; reads, writes: overlap of their input and output",
    "directions, 0 to 1; signs: share of the magnitude changes with equal signs;",
    "disturbance: the other's output over its own, for the first and the second.",
]


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
    prefix, names = short_names([name for name, _ in shown], 24)
    width = max(map(len, [prefix, *names]))
    lines = [
        f"{prefix:{width}}  {'ΔM':>8} {'ΔM rel.':>8} {'ΔD':>8} {'angle':>8} "
        f"{'rank':>5}  kind"
    ]
    for name, (_, members) in zip(names, shown, strict=True):
        angle = np.degrees(np.mean([matrix.row_angle.mean() for matrix in members]))
        rank = _mean(members, "effective_rank")
        lines.append(
            f"{name:{width}}  {_mean(members, 'delta_m'):8.2e} "
            f"{_mean(members, 'delta_m_relative'):8.3%} "
            f"{_mean(members, 'delta_d'):8.2e} {angle:7.3f}° "
            f"{f'{rank:.1f}' if rank else '-':>5}  {_kind(members)}"
        )
    if len(shown) < len(rows):
        lines.append(f"and {len(rows) - len(shown)} more (--top, --by layer)")
    lines += ANALYSIS_LEGEND
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
    prefix, names = short_names([pair.name for pair in pairs], 28)
    width = max(map(len, [prefix, *names]))
    lines.append(
        f"{prefix:{width}}  pair  {'cosine':>7} {'reads':>6} {'writes':>6} "
        f"{'signs':>6}  disturbance"
    )
    lines += [
        f"{name:{width}}  {f'{pair.first + 1}-{pair.second + 1}':<4}  "
        f"{pair.update_cosine:+7.3f} {pair.input_overlap:6.3f} "
        f"{pair.output_overlap:6.3f} {1 - pair.sign_conflict:6.1%}  "
        f"{pair.disturbs_first:.3f} {pair.disturbs_second:.3f}"
        for name, pair in zip(names, pairs, strict=True)
    ]
    if len(pairs) < len(comparison.pairs):
        lines.append(f"and {len(comparison.pairs) - len(pairs)} more (--top)")
    lines += COMPARISON_LEGEND
    return lines + advice_lines(comparison.guidance)


def short_names(names: Sequence[str], width: int) -> tuple[str, list[str]]:
    """Take the common start out of module paths and cut what is still too long.

    Args:
        names: The paths.
        width: Greatest length.

    Returns:
        The common start, with an ellipsis, or nothing; and the short names.
    """
    parts = [name.split(".") for name in names]
    steps = zip(*(path[:-1] for path in parts), strict=False)
    shared = [step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps)]
    start = len(shared) if len(names) > 1 else 0
    short = [".".join(path[start:]) for path in parts]
    tail = width - 7  # the module and the index of an expert matter most
    cut = [n if len(n) <= width else f"{n[:6]}…{n[-tail:]}" for n in short]
    prefix = ".".join([*shared[:start], "…"]) if start else ""
    return prefix if len(prefix) <= width else "…", cut


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
