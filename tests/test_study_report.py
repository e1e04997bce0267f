"""The report of results whose answers are known, complete and partial."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import ROOT

WHEN = ROOT / "benchmarks" / "when"


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(WHEN)
    import grid  # pyright: ignore[reportMissingImports]

    yield grid
    sys.modules.pop("grid")


def quality(cell: Any) -> float:
    """Loss of a cell at its best rate, as a multiple of LoRA's of high rank.

    DoRA gains 8 % at rank 1, 4 % at rank 4, 0 at rank 16, and 2 % more in 4 bits; its
    magnitudes are worth 5 %; LoRA of its cost is as good as LoRA.
    """
    gain = {1: 0.08, 4: 0.04, 16: 0.0}.get(cell.rank, 0.0)
    gain += 0.02 * (cell.base == "4-bit")
    return {
        "lora": 1.0,
        "dora": 1 - gain,
        "direction": (1 - gain) * 1.05,
        "magnitude": 1.4,
        "full": 1.1,
    }[cell.method]


def width(method: str) -> float:
    """How fast the loss rises from its best: DoRA's curves are flatter."""
    return {"dora": 0.004, "lora": 0.03}.get(method, 0.02)


def line(job: Any) -> dict[str, Any]:
    """A run of the imagined study."""
    draw = np.random.default_rng(job.seed)  # the same for all methods
    rows = draw.uniform(1, 5, 20)
    curve = 1 + width(job.cell.method) * (job.place - 3) ** 2
    if job.cell.method == "magnitude" and job.place == 6:
        curve = 100
    factor = quality(job.cell) * curve
    entry = {
        "cell": vars(job.cell),
        "place": job.place,
        "rate": job.cell.rate(job.place),
        "seed": job.seed,
        "untrained_loss": 4.0,
        "trainable": 1000 + job.cell.rank,
        "valid_loss": round(factor, 6),
        "diverged": factor > 4,
        "test_loss": round(factor, 6),
        "right": 0.5,
        "row_losses": (factor * rows).round(4).tolist(),
        "cpu_seconds": 36.0,
    }
    if job.cell.method == "direction" and job.place == 6:
        entry |= {"valid_loss": None}
    if job.seed >= 3:
        # The correlation of delta M and D falls as the loss rises.
        d = np.arange(14.0)
        m = d + 3 * factor * np.cos(np.arange(14) * 2.5)
        rank = 8.0 if job.cell.method == "dora" else 4.0
        entry["geometry"] = {f"m{i}": [m[i], d[i], rank] for i in range(14)}
    return entry


def study(grid: Any, cells: list[Any], *, more: bool = True) -> list[dict[str, Any]]:
    """All runs of some cells."""
    results: dict[Any, Any] = {}
    for cell in cells:
        own: dict[Any, Any] = {}
        while jobs := grid.wanted(cell, own):
            own |= {job: line(job) for job in jobs}
        if more:
            further = grid.equal_parameters(cell, own) + grid.equal_time(cell, own)
            own |= {job: line(job) for job in further}
        results |= own
    task = {"task": "topics", "data": "0", "row_targets": [1] * 20}
    return [task, *results.values()]


def report(
    folder: Path, lines: list[dict[str, Any]], rewards: Sequence[dict[str, Any]] = ()
) -> dict[str, str]:
    """Run the command on lines; return its text by heading. It draws into `figures`."""
    for name, part in (("when", lines), ("when_reward", rewards)):
        text = "".join(json.dumps(line) + "\n" for line in part)
        (folder / f"{name}.jsonl").write_text(text)
    command = [sys.executable, WHEN / "report.py", "--results", folder]
    command += ["--figures", folder / "figures"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *parts = done.stdout.split("\n## ")
    return {"": first} | {part[:2]: part for part in parts}


def rows_of(text: str) -> list[list[str]]:
    """The rows of a Markdown table."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_a_complete_study_gets_the_known_verdicts(grid: Any, tmp_path: Path) -> None:
    lines = study(grid, grid.main_cells())
    text = report(tmp_path, lines)
    assert text[""].startswith(f"{len(lines) - 1} runs, ")
    failed = [line for line in lines if line.get("valid_loss", 0) is None]
    diverged = [line for line in lines if line.get("valid_loss", 0) == 140]
    assert len(failed) == 18 * 3
    assert len(diverged) == 6 * 3
    assert f"{len(failed)} failed, {len(diverged)} more diverged" in text[""]
    assert "63 are complete, 0 begun and 0 missing" in text[""]
    verdicts = {
        (task, base, rank): (shown, verdict)
        for task, base, rank, shown, verdict in rows_of(text["H1"])
    }
    assert len(verdicts) == 18
    for (_, base, rank), (shown, verdict) in verdicts.items():
        gain = {"1": 8, "4": 4, "16": 0}[rank] + 2 * (base == "4-bit")
        # Rates away from the best move no mean: each method's best is at place 3.
        assert shown.startswith(f"-{gain}.0%" if gain else "+0.0%"), shown
        assert verdict == ("better" if gain > 1 else "alike")
    equal = rows_of(text["H2"])
    assert len(equal) == 18
    assert {row[-1] for row in equal if row[2] == "1"} == {"better"}
    assert {row[-1] for row in equal if row[2] == "16"} == {"alike"}
    low = rows_of(text["H3"])
    assert len(low) == 6
    assert all(row[-2].startswith("-8.0%") and row[-1] == "better" for row in low)
    packed = rows_of(text["H4"])
    assert len(packed) == 9
    assert all(row[-2].startswith("-2.0%") and row[-1] == "better" for row in packed)
    assert {row[-1] for row in rows_of(text["H6"])} == {"better"}
    assert "wider in 18 cells and narrower in 0" in text["H5"]
    assert f"p = {2 / 2**18:.2g}" in text["H5"]
    ratios = {row[3]: row[4:] for row in rows_of(text["H7"]) if row[0] == "topics"}
    assert ratios["correlation of ΔM and ΔD"][0].startswith("-1.00")
    assert ratios["correlation of ΔM and ΔD"][1] == "yes"
    assert "higher in 18 cells and lower in 0" in text["En"]
    assert "missing" not in text["H1"] + text["H4"]


def test_a_partial_study_says_what_is_missing(grid: Any, tmp_path: Path) -> None:
    cells = [
        grid.Cell("docstrings", "dense", method, rank)
        for method in ("lora", "dora")
        for rank in (1, 4)
    ]
    lines = study(grid, cells, more=False)
    unfinished = [
        line(grid.Job(grid.Cell("docstrings", "dense", "direction", 1), 0, 0))
    ]
    text = report(tmp_path, lines + unfinished)
    assert "4 are complete, 1 begun and 58 missing" in text[""]
    [direction] = [row for row in rows_of(text[""]) if row[2].startswith("direction")]
    assert direction[2] == "direction *(runs are missing)*"
    verdicts = [row[-1] for row in rows_of(text["H1"])]
    assert verdicts == ["better", "better", *["-"] * 16]
    assert "16 of 18 comparisons lack runs." in text["H1"]
    for name, count in (("H2", 18), ("H3", 6), ("H4", 9), ("H6", 18)):
        assert {row[-1] for row in rows_of(text[name])} == {"-"}
        assert f"{count} of {count} comparisons lack runs." in text[name]
    assert (
        "(runs are missing)"
        in (tmp_path / "figures/when-docstrings-dense.svg").read_text()
    )


def test_no_result_is_no_error(tmp_path: Path) -> None:
    assert report(tmp_path, [])[""].startswith("0 runs, 0 failed")


def test_a_figure_has_a_curve_for_each_method_and_rank(
    grid: Any, tmp_path: Path
) -> None:
    dense = [cell for cell in grid.main_cells() if cell.base == "dense"]
    report(tmp_path, study(grid, dense, more=False))
    files = sorted((tmp_path / "figures").iterdir())
    names = ["correlation", "docstrings-dense", "entropy", "records-dense"]
    assert [file.stem for file in files] == [
        f"when-{name}" for name in (*names, "topics-dense")
    ]
    paths = classes(files[4])
    panels_and_legend = 3 + 1
    for method in ("lora", "dora", "direction", "magnitude", "full"):
        assert paths.count(f"line {method}") == panels_and_legend
    # Seven rates at each rank, and the mark in the legend.
    assert paths.count("lora-mark") == 3 * 7 + 1
    assert paths.count("magnitude-mark") == 3 * 6 + 1  # a rate far above is cut off
    assert "prefers-color-scheme: dark" in files[4].read_text()
    # Three rates of two seeds for each of eleven cells of a task, and the legend.
    for file in (files[0], files[2]):
        marks = [name for name in classes(file) if name.endswith("-mark")]
        assert len(marks) == 3 * 11 * 3 * 2 + 5
        assert not any(name.startswith("line") for name in classes(file))


def classes(figure: Path) -> list[str]:
    """The classes of a figure's paths."""
    paths = [element for element in ET.parse(figure).iter() if "path" in element.tag]
    return [path.get("class", "") for path in paths]
