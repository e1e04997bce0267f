"""Curves as SVG that follows the reader's light or dark theme.

Colors are those of Okabe and Ito, which color-blind readers can tell apart; each method
also has a dash and a mark of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, TOP = 900, 330, 64, 16, 58
FLOOR = HEIGHT - 46  # the horizontal axis
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
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
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
    """Points of methods.

    Attributes:
        title: Title.
        points: By method, points (x, y); those of a curve by x.
    """

    title: str
    points: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Plot:
    """What panels of a figure share.

    Attributes:
        title: Title of the figure.
        across, down: What the axes show.
        most: Largest y shown; a curve leaves the panel there.
        is_curve: Whether points are linked, over the logarithm of x. Otherwise they are
            single marks over x itself.
    """

    title: str
    across: str
    down: str
    most: float
    is_curve: bool = True

    def draw(self, panels: Sequence[Panel]) -> str:
        """Draw panels from left to right."""
        points = [p for panel in panels for of in panel.points.values() for p in of]
        xs = [self._place(x) for x, _ in points]
        ys = [min(y, self.most) for _, y in points]
        low, high = _widened(ys, 0.06)
        start, end = _widened(xs, 0.05)
        size = (WIDTH - LEFT - RIGHT - GAP * (len(panels) - 1)) / len(panels)
        parts = [
            f'<text class="title" x="{LEFT}" y="20">{self.title}</text>',
            self._legend(panels),
            f'<text class="small" transform="translate(14,{(TOP + FLOOR) / 2:.0f}) '
            f'rotate(-90)" text-anchor="middle">{self.down}</text>',
        ]
        for number, panel in enumerate(panels):
            frame = _Frame(
                LEFT + number * (size + GAP), size, (start, end), (low, high)
            )
            parts.append(frame.axes(panel.title, self, with_labels=number == 0))
            for method, of in panel.points.items():
                places = [
                    (frame.x(self._place(x)), frame.y(min(y, high)), y <= high)
                    for x, y in of
                ]
                parts.append(_points(method, places, is_linked=self.is_curve))
        return _page(parts, f"{self.title}: {self.down} over {self.across}")

    def ticks(self, low: float, high: float) -> list[tuple[float, str]]:
        """Places and labels of the horizontal axis."""
        if not self.is_curve:
            return [(tick, _shown(tick)) for tick in _ticks(low, high)]
        powers = range(math.ceil(low), math.floor(high) + 1)
        return [(power, f"10{str(power).translate(_RAISED)}") for power in powers]

    def _place(self, x: float) -> float:
        return math.log10(x) if self.is_curve else x

    def _legend(self, panels: Sequence[Panel]) -> str:
        """The methods that occur, at the right of the title."""
        names = [n for n in STYLES if any(n in panel.points for panel in panels)]
        widths = [46 + 6.6 * len(NAMES[name]) for name in names]
        parts, x = [], WIDTH - RIGHT - sum(widths)
        for name, width in zip(names, widths, strict=True):
            places = [(x, 16, False), (x + 13, 16, True), (x + 26, 16, False)]
            parts.append(_points(name, places, is_linked=self.is_curve))
            parts.append(f'<text x="{x + 32:.1f}" y="20">{NAMES[name]}</text>')
            x += width
        return "\n".join(parts)


@dataclass(frozen=True)
class _Frame:
    """The place of a panel, and the ranges of its axes."""

    left: float
    size: float
    across: tuple[float, float]
    down: tuple[float, float]

    def x(self, value: float) -> float:
        start, end = self.across
        return self.left + self.size * (value - start) / (end - start)

    def y(self, value: float) -> float:
        low, high = self.down
        return TOP + (FLOOR - TOP) * (high - value) / (high - low)

    def axes(self, title: str, plot: Plot, *, with_labels: bool) -> str:
        """The title, the grid and the labels."""
        left, size = self.left, self.size
        parts = [f'<text class="panel" x="{left:.1f}" y="{TOP - 6}">{title}</text>']
        for tick in _ticks(*self.down):
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{left:.1f},{y:.1f}h{size:.1f}"/>')
            if with_labels:
                parts.append(
                    f'<text class="small" x="{left - 6:.1f}" y="{y + 4:.1f}" '
                    f'text-anchor="end">{_shown(tick)}</text>'
                )
        parts.append(f'<path class="axis" d="M{left:.1f},{FLOOR}h{size:.1f}"/>')
        for tick, label in plot.ticks(*self.across):
            x = f"{self.x(tick):.1f}"
            parts.append(f'<path class="axis" d="M{x},{FLOOR}v5"/>')
            parts.append(
                f'<text class="small" x="{x}" y="{FLOOR + 19}" '
                f'text-anchor="middle">{label}</text>'
            )
        parts.append(
            f'<text class="small" x="{left + size / 2:.1f}" y="{HEIGHT - 8}" '
            f'text-anchor="middle">{plot.across}</text>'
        )
        return "\n".join(parts)


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


def _points(
    method: str, places: Sequence[tuple[float, float, bool]], *, is_linked: bool
) -> str:
    """Points (x, y, whether it has a mark), perhaps with a line through them."""
    parts = []
    if is_linked:
        path = "L".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<path class="line {method}" d="M{path}"/>')
    parts += [
        f'<path class="{method}-mark" transform="translate({x:.1f},{y:.1f})" '
        f'd="{_MARKS[STYLES[method][3]]}"/>'
        for x, y, is_marked in places
        if is_marked
    ]
    return "\n".join(parts)


def _widened(values: Sequence[float], share: float) -> tuple[float, float]:
    """The range of values, and a share of it on both sides."""
    low, high = min(values), max(values)
    margin = share * (high - low) or abs(high) or 1.0
    return low - margin, high + margin


def _shown(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def _ticks(low: float, high: float) -> list[float]:
    """Round values inside an interval, about five."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw)
    first = math.ceil(low / step)
    return [round(n * step, 10) for n in range(first, math.floor(high / step) + 1)]
