"""Table of a kit's kernel timings: kernel and plain MLX, at the shapes of a model.

python benchmarks/gpu/summary.py benchmarks/results/h200_f246934.jsonl
"""

import json
import sys
from pathlib import Path
from typing import Any

SHAPES = ([4096, 4096], [2048, 4096])
RANKS = (0, 8, 64)
HEAD = """\
| op | shape | rank | kernel | plain MLX | kernel ÷ plain | taken |
| --- | --- | ---: | ---: | ---: | ---: | --- |"""
MARGIN = 0.02


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the timed cases in bfloat16, in the order of the file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    cases = [json.loads(line) for line in lines]
    return [
        case
        for case in cases
        if case["dtype"] == "bfloat16"
        and case["shape"] in SHAPES
        and case["r"] in RANKS
        and "kernel" in case
    ]


def table(path: Path) -> str:
    """Return the cases as a table in Markdown; plain MLX is its faster form."""
    lines = [HEAD]
    for case in rows(path):
        kernel = case["kernel"][0]
        plain = min(case[side][0] for side in ("compiled", "plain") if side in case)
        taken = "kernel" if kernel < plain * (1 - MARGIN) else "plain MLX"
        height, width = case["shape"]
        lines.append(
            f"| {case['op']} | {height} × {width} | {case['r'] or '–'} | {kernel:.0f} "
            f"| {plain:.0f} | {kernel / plain:.2f} | {taken} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
