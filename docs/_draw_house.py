"""Draw the packages and their imports as `docs/assets/house.svg`.

    python docs/_draw_house.py

The rows come from the table of `tests/test_architecture.py`, and the lines from the
same imports that this test reads. A line is left out where a longer path of lines
implies it.
"""

import ast
import random
import sys
from itertools import combinations
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from tests.test_architecture import LAYERS, RANK, imports  # noqa: E402 - from ROOT

TITLES = {  # of a row, by its first package
    "cli": "commands",
    "demo": "whole jobs",
    "train": "the work",
    "evaluate": "measuring",
    "data": "data, formats",
    "adapters": "adapters",
    "layers": "layers",
    "decomposition": "arrays",
    "kernels": "kernels, files",
    "matrix": "mathematics",
    "options": "options",
    "errors": "common ground",
}
WIDTH, LEFT, TOP = 860, 150, 16
BOX, HEIGHT, STEP = 118, 32, 62
COLUMNS = 5  # places of a box in its row
PATIENCE = 600  # swaps without a gain, after which the search ends

STYLE = """\
  text { font: 14px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2430; }
  .row { font-size: 12px; fill: #6b7280; }
  rect { fill: #eef2ff; stroke: #4f5fc4; stroke-width: 1.2; }
  path { fill: none; stroke: #8b95c9; stroke-width: 1.3; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e8f0; }
    .row { fill: #a3a8b8; }
    rect { fill: #2a2f4a; stroke: #8f9cf5; }
    path { stroke: #6a74b3; }
  }
"""


def graph() -> dict[str, set[str]]:
    """Return the packages that each package imports, without the commands'."""
    found: dict[str, set[str]] = {name: set() for name in RANK}
    for file in (ROOT / "mlx_dora").rglob("*.py"):
        own = file.relative_to(ROOT / "mlx_dora").with_suffix("").parts[0]
        if own not in RANK or file.name == "__main__.py":
            continue
        for _, target in imports(ast.parse(file.read_text(encoding="utf-8"))):
            top, *rest = target.split(".")
            if top == "mlx_dora" and rest and rest[0] in RANK and rest[0] != own:
                found[own].add(rest[0])
    return found


def reduced(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Leave out every import that a path through other packages implies."""

    def below(name: str) -> set[str]:
        return edges[name].union(*(below(other) for other in edges[name]))

    return [
        (name, other)
        for name in sorted(edges, key=lambda name: (RANK[name], name))
        for other in sorted(edges[name])
        if not any(other in below(middle) for middle in edges[name] - {other})
    ]


def placed(edges: list[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """Return the center of each box, found by a search that always ends the same way.

    Lines behind boxes count most, then lines that cross, then their length.
    """
    slots = [LEFT + (WIDTH - LEFT) * (at + 0.5) / COLUMNS for at in range(COLUMNS)]
    chance = random.Random(0)
    rows = [[*names, *[""] * (COLUMNS - len(names))] for names in LAYERS]

    def centers() -> dict[str, tuple[float, float]]:
        return {
            name: (slots[at], TOP + HEIGHT / 2 + STEP * rank)
            for rank, row in enumerate(rows)
            for at, name in enumerate(row)
            if name
        }

    def cost() -> float:
        at = centers()
        total = 0.0
        lines = [(*at[upper], *at[lower]) for upper, lower in edges]
        for x1, y1, x2, y2 in lines:
            total += abs(x2 - x1) / WIDTH
            for x, y in at.values():
                if y1 < y < y2:
                    passes = x1 + (x2 - x1) * (y - y1) / (y2 - y1)
                    total += 20 * (abs(passes - x) < BOX / 2 + 4)
        for (a1, b1, a2, b2), (c1, d1, c2, d2) in combinations(lines, 2):
            top, bottom = max(b1, d1), min(b2, d2)
            if top < bottom:
                gaps = [
                    a1
                    + (a2 - a1) * (y - b1) / (b2 - b1)
                    - c1
                    - (c2 - c1) * (y - d1) / (d2 - d1)
                    for y in (top, bottom)
                ]
                total += gaps[0] * gaps[1] < 0
        return total

    best, left = cost(), PATIENCE
    while left:
        row = chance.choice(rows)
        one, other = chance.sample(range(COLUMNS), 2)
        row[one], row[other] = row[other], row[one]
        new = cost()
        if new <= best:
            left = PATIENCE if new < best else left - 1
            best = new
        else:
            row[one], row[other] = row[other], row[one]
            left -= 1
    return centers()


def draw() -> str:
    """Return the drawing as SVG."""
    edges = reduced(graph())
    centers = placed(edges)
    height = TOP * 2 + HEIGHT + STEP * (len(LAYERS) - 1)
    lines = []
    for upper, lower in edges:
        (x1, y1), (x2, y2) = centers[upper], centers[lower]
        lines.append(f'<path d="M{x1:.0f},{y1:.0f} L{x2:.0f},{y2:.0f}"/>')
    for name, (x, y) in centers.items():
        lines.append(
            f'<rect x="{x - BOX / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{BOX}" '
            f'height="{HEIGHT}" rx="6"/>'
            f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle">{name}</text>'
        )
    for rank, names in enumerate(LAYERS):
        title = TITLES.get(names[0], "")
        y = TOP + HEIGHT / 2 + STEP * rank + 4
        lines.append(f'<text class="row" x="8" y="{y:.0f}">{title}</text>')
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'role="img" aria-label="Packages of mlx_dora and their imports">\n'
        f"<style>\n{STYLE}</style>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    (DOCS / "assets" / "house.svg").write_text(draw(), encoding="utf-8")
