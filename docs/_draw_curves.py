"""Draw the curves of the pages on GRPO and on preferences from stored results.

    python docs/_draw_curves.py

Reads `benchmarks/results/grpo_numbers.jsonl` and `preferences.jsonl`, which
`benchmarks/compare_grpo.py` and `compare_preferences.py` write, and makes
`docs/assets/grpo.svg` and `docs/assets/preferences.svg`. A line is the mean over the
seeds, and its band reaches from the lowest seed to the highest.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
WIDTH, HEIGHT = 860, 330
TOP, BOTTOM = 48, 278  # of a panel
GROUP = 4  # updates of GRPO that a point averages

STYLE = """\
  text { font: 14px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2430; }
  .small { font-size: 12px; fill: #5b6270; }
  .title { font-weight: 600; }
  .grid { stroke: #d5d8e2; }
  .rule { stroke: #6b7280; stroke-dasharray: 2 4; }
  .line { fill: none; stroke-width: 2.5; }
  .band { stroke: none; opacity: 0.18; }
  .one.line { stroke: #0072b2; } .one.band, .one.dot { fill: #0072b2; }
  .two.line { stroke: #d55e00; stroke-dasharray: 7 4; }
  .two.band, .two.dot { fill: #d55e00; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e8f0; } .small { fill: #a9afbf; } .grid { stroke: #3a3f52; }
    .rule { stroke: #9aa1b1; }
    .one.line { stroke: #56b4e9; } .one.band, .one.dot { fill: #56b4e9; }
    .two.line { stroke: #e69f00; } .two.band, .two.dot { fill: #e69f00; }
  }
"""

Points = dict[float, list[float]]
"""The values of all seeds at each place."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line with its band: name, class of the style, and points."""

    name: str
    style: str
    points: Points


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A coordinate system: where it stands, its ticks, and a rule with its name."""

    title: str
    below: str
    left: float
    right: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    rule: tuple[float, str] | None = None

    def x(self, value: float) -> float:
        """Place of a value on the axis below."""
        share = (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        """Place of a value on the axis at the left."""
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return BOTTOM - share * (BOTTOM - TOP)

    def axes(self) -> list[str]:
        """Title, grid and ticks."""
        made = [_text(self.left, TOP - 20, self.title, "title")]
        middle = (self.left + self.right) / 2
        made.append(_text(middle, BOTTOM + 42, self.below, "small", "middle"))
        for tick in self.y_ticks:
            y = self.y(tick)
            made.append(_line(self.left, y, self.right, y, "grid"))
            made.append(_text(self.left - 8, y + 4, f"{tick:g}", "small", "end"))
        for tick in self.x_ticks:
            made.append(
                _text(self.x(tick), BOTTOM + 20, f"{tick:g}", "small", "middle")
            )
        if self.rule is not None:
            y = self.y(self.rule[0])
            made.append(_line(self.left, y, self.right, y, "rule"))
            made.append(_text(self.right, y - 6, self.rule[1], "small", "end"))
        return made

    def curve(self, series: Series) -> list[str]:
        """A line over the means, with its dots, its band and its name."""
        style, at = series.style, sorted(series.points)
        of = [(x, sum(series.points[x]) / len(series.points[x])) for x in at]
        high = [(x, max(series.points[x])) for x in at]
        low = [(x, min(series.points[x])) for x in reversed(at)]
        made = [f'<path class="band {style}" d="{self._path([*high, *low])} z"/>']
        made.append(f'<path class="line {style}" d="{self._path(of)}"/>')
        for x, y in of:
            place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}"'
            made.append(f'<circle class="dot {style}" {place} r="3.5"/>')
        return made

    def _path(self, points: list[tuple[float, float]]) -> str:
        places = (f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f"M{' L'.join(places)}"


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{text}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{style}" {place}/>'


def _legend(series: Sequence[Series], left: float) -> list[str]:
    made = []
    for number, one in enumerate(series):
        x, y = left + 130 * number, HEIGHT - 8
        made.append(_line(x, y - 4, x + 34, y - 4, f"line {one.style}"))
        made.append(_text(x + 42, y, one.name, "small"))
    return made


def _drawing(label: str, parts: list[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{label}">\n<style>\n{STYLE}</style>\n{body}\n</svg>\n'
    )


def rows(name: str) -> list[dict[str, Any]]:
    """The lines of a file of results."""
    lines = (RESULTS / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def draw_grpo() -> str:
    """Return the mean reward of the training completions, by method, as SVG."""
    made = []
    for method, name, style in (("dora", "DoRA", "one"), ("lora", "LoRA", "two")):
        points: Points = {}
        for row in rows("grpo_numbers.jsonl"):
            if row["job"]["method"] == method:
                for at in range(0, len(row["curve"]), GROUP):
                    part = row["curve"][at : at + GROUP]
                    middle = at + (len(part) + 1) / 2
                    points.setdefault(middle, []).append(sum(part) / len(part))
        made.append(Series(name=name, style=style, points=points))
    panel = Panel(
        title="Mean reward of the completions in training",
        below=f"updates (each point: {GROUP} of them)",
        left=60,
        right=WIDTH - 30,
        x_ticks=range(0, 33, 4),
        y_ticks=(0, 0.25, 0.5, 0.75, 1),
    )
    parts = panel.axes() + [part for one in made for part in panel.curve(one)]
    label = "Mean reward by updates of GRPO, DoRA and LoRA, three seeds each"
    return _drawing(label, parts + _legend(made, panel.left))


def draw_preferences() -> str:
    """Return the validation of DPO by steps as SVG."""
    own = [row for row in rows("preferences.jsonl") if row["objective"] == "dpo"]

    def points(of: Callable[[dict[str, Any]], float], first: int) -> Points:
        made: Points = {}
        for row in own:
            for at in row["curve"]:
                if at["val_loss"] is not None and at["step"] >= first:
                    made.setdefault(at["step"], []).append(of(at))
        return made

    loss = points(lambda at: at["val_loss"], 0)
    accuracy = points(lambda at: at["metrics"]["rewards/accuracies"], 1)
    steps = range(0, 81, 20)
    panels = (
        (
            Panel(title="Validation loss", below="steps", left=60, right=400,
                  x_ticks=steps, y_ticks=(0.4, 0.5, 0.6, 0.7, 0.8),
                  rule=(0.6931, "no preference: ln 2")),
            loss,
        ),
        (
            Panel(title="Accuracy of the rewards in validation", below="steps",
                  left=490, right=WIDTH - 30, x_ticks=steps,
                  y_ticks=(0.4, 0.5, 0.6, 0.7, 0.8, 0.9), rule=(0.5, "chance")),
            accuracy,
        ),
    )  # fmt: skip
    parts: list[str] = []
    for panel, values in panels:
        series = Series(name="DPO", style="one", points=values)
        parts += panel.axes() + panel.curve(series)
    label = f"Validation loss and accuracy of rewards by steps of DPO, {len(own)} seeds"
    return _drawing(label, parts)


DRAWINGS = {"grpo.svg": draw_grpo, "preferences.svg": draw_preferences}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (DOCS / "assets" / name).write_text(draw(), encoding="utf-8")
