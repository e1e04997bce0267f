"""Curves as SVG that follows the reader's light or dark theme.

Colors are those of Okabe and Ito, which color-blind readers can tell apart; each method
also has a dash and a mark of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 330, 64, 16, 58, 46
GAP = 22  # between panels

STYLES = {  # of a method: color on light, on dark; dash; mark
    "lora": ("#0072b2", "#56b4e9", "", "circle"),
    "dora": ("#d55e00", "#ff9050", "", "square"),
    "direction": ("#009e73", "#3ad6a8", "7 3", "triangle"),
    "magnitude": ("#a3508a", "#e79cc8", "2 3", "diamond"),
    "full": ("#6b7280", "#b6bcc9", "9 3 2 3", "cross"),
}
NAMES = {
    "lora": "LoRA",
    "dora": "DoRA",
    "direction": "DoRA, frozen magnitudes",
    "magnitude": "magnitudes alone",
    "full": "full",
}
_MARKS = {
    "circle": "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0z",
    "square": "M-3.2,-3.2h6.4v6.4h-6.4z",
    "triangle": "M0,-4.2L4,3H-4z",
    "diamond": "M0,-4.6L4.6,0L0,4.6L-4.6,0z",
    "cross": "M-4,-1.2h2.8v-2.8h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8z",
}
_STYLE = """\
  text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2430; }
  .title { font-size: 14px; font-weight: 600; }
  .panel { font-weight: 600; }
  .small { fill: #5b6270; }
  .grid { stroke: #e3e6ee; fill: none; }
  .axis { stroke: #9aa1b1; fill: none; }
  .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
"""
_DARK = """\
    text { fill: #e6e8f0; }
    .small { fill: #a3a8b8; }
    .grid { stroke: #333a4d; }
    .axis { stroke: #6b7389; }
"""


@dataclass(frozen=True)
class Panel:
    """Curves over the learning rate.

    Attributes:
        title: Title.
        curves: By method, points (rate, value), by rate.
    """

    title: str
    curves: Mapping[str, Sequence[tuple[float, float]]]


def draw(title: str, label: str, panels: Sequence[Panel], most: float) -> str:
    """Draw panels that share their axes.

    Args:
        title: Title of the figure.
        label: What the vertical axis shows.
        panels: The panels, from left to right.
        most: Largest value shown; a curve leaves the panel there.
    """
    points = [p for panel in panels for curve in panel.curves.values() for p in curve]
    rates = [math.log2(rate) for rate, _ in points]
    values = [min(value, most) for _, value in points]
    span = max(values) - min(values) or abs(max(values)) or 1.0
    low, high = min(values) - 0.06 * span, max(values) + 0.06 * span
    start, end = min(rates) - 0.4, max(rates) + 0.4
    size = (WIDTH - LEFT - RIGHT - GAP * (len(panels) - 1)) / len(panels)

    def down(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [f'<text class="title" x="{LEFT}" y="20">{title}</text>', _legend(panels)]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="small" transform="translate(14,{middle:.0f}) rotate(-90)" '
        f'text-anchor="middle">{label}</text>'
    )
    for number, panel in enumerate(panels):
        left = LEFT + number * (size + GAP)

        def across(rate: float, left: float = left) -> float:
            return left + size * (math.log2(rate) - start) / (end - start)

        parts.append(f'<text class="panel" x="{left:.1f}" y="{TOP - 6}">')
        parts.append(f"{panel.title}</text>")
        for tick in _ticks(low, high):
            y = f"{down(tick):.1f}"
            parts.append(f'<path class="grid" d="M{left:.1f},{y}h{size:.1f}"/>')
            if number == 0:
                parts.append(
                    f'<text class="small" x="{left - 6:.1f}" y="{down(tick) + 4:.1f}" '
                    f'text-anchor="end">{tick:.6g}</text>'
                )
        floor = HEIGHT - BOTTOM
        parts.append(f'<path class="axis" d="M{left:.1f},{floor}h{size:.1f}"/>')
        for power in range(math.ceil(start / math.log2(10)), 1):
            rate = 10.0**power
            if start <= math.log2(rate) <= end:
                x = f"{across(rate):.1f}"
                parts.append(f'<path class="axis" d="M{x},{floor}v5"/>')
                parts.append(f'<text class="small" x="{x}" y="{floor + 19}" ')
                parts.append(f'text-anchor="middle">{rate:g}</text>')
        middle = left + size / 2
        parts.append(
            f'<text class="small" x="{middle:.1f}" y="{HEIGHT - 8}" '
            'text-anchor="middle">learning rate</text>'
        )
        for method, curve in panel.curves.items():
            inside = [
                (across(rate), down(min(value, high)), value <= high)
                for rate, value in curve
            ]
            parts.append(_curve(method, inside))
    return _page(parts, f"{title}: {label} over the learning rate")


def _page(parts: Sequence[str], description: str) -> str:
    """The SVG of parts, with its style."""
    light, dark = [], []
    for name, (bright, night, dash, _) in STYLES.items():
        rule = f"stroke-dasharray: {dash};" if dash else ""
        light.append(f"  .{name} {{ stroke: {bright}; {rule} }}")
        light.append(f"  .{name}-mark {{ fill: {bright}; }}")
        dark.append(f"    .{name} {{ stroke: {night}; }}")
        dark.append(f"    .{name}-mark {{ fill: {night}; }}")
    style = _STYLE + "\n".join(light) + "\n  @media (prefers-color-scheme: dark) {\n"
    style += _DARK + "\n".join(dark) + "\n  }\n"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{description}">\n<style>\n{style}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _legend(panels: Sequence[Panel]) -> str:
    """The methods that occur, on one line at the right of the title."""
    names = [name for name in STYLES if any(name in panel.curves for panel in panels)]
    parts, x = [], WIDTH - RIGHT - sum(46 + 6.6 * len(NAMES[name]) for name in names)
    for name in names:
        parts.append(_curve(name, [(x, 16, False), (x + 13, 16, True)]))
        parts.append(_curve(name, [(x + 13, 16, False), (x + 26, 16, False)]))
        parts.append(f'<text x="{x + 32:.1f}" y="20">{NAMES[name]}</text>')
        x += 46 + 6.6 * len(NAMES[name])
    return "\n".join(parts)


def _curve(method: str, points: Sequence[tuple[float, float, bool]]) -> str:
    """A line through points (x, y, whether it has a mark there)."""
    path = "L".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    parts = [f'<path class="line {method}" d="M{path}"/>']
    mark = _MARKS[STYLES[method][3]]
    parts += [
        f'<path class="{method}-mark" transform="translate({x:.1f},{y:.1f})" '
        f'd="{mark}"/>'
        for x, y, is_marked in points
        if is_marked
    ]
    return "\n".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Round values inside an interval, about five."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw)
    first = math.ceil(low / step)
    return [round(n * step, 10) for n in range(first, math.floor(high / step) + 1)]
