"""Tables and figures of the study, from its results.

    python benchmarks/when/report.py [--results FILE] [--figures docs/studies]

Prints Markdown. With ``--figures``, also draws the mean validation loss over learning
rates, for each task and base, as SVG.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
from decide import Difference, difference, holm, octaves_within, spearman
from grid import BASES, RANKED, RANKS, STEPS, TASKS, Cell

RESULTS = Path(__file__).parents[1] / "results" / "when.jsonl"
Line = Mapping[str, Any]


class Runs:
    """The lines of the results, by cell and place of the learning rate."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self._by: dict[Cell, dict[int, list[Line]]] = {}
        for line in sorted(lines, key=lambda line: line["seed"]):
            cell = Cell(**line["cell"])
            self._by.setdefault(cell, {}).setdefault(line["place"], []).append(line)

    @property
    def cells(self) -> list[Cell]:
        """The cells with results."""
        return sorted(self._by)

    def curve(self, cell: Cell) -> dict[int, float]:
        """Mean validation loss by place; inf where a run failed."""
        return {
            place: float(np.mean([_loss(line) for line in lines]))
            for place, lines in sorted(self._by[cell].items())
        }

    def best(self, cell: Cell) -> list[Line]:
        """The lines of all seeds at the best rate."""
        curve = self.curve(cell)
        return self._by[cell][min(curve, key=curve.__getitem__)]

    def compare(self, first: Cell, second: Cell) -> Difference | None:
        """Compare two cells at their best rates, over the seeds that both have."""
        if first not in self._by or second not in self._by:
            return None
        lines = [
            {line["seed"]: line for line in self.best(cell)} for cell in (first, second)
        ]
        seeds = sorted(lines[0].keys() & lines[1].keys())
        ours, theirs = (
            np.array([by[seed]["row_losses"] for seed in seeds]) for by in lines
        )
        return difference(ours, theirs, np.array(lines[0][seeds[0]]["row_targets"]))


def cells_table(runs: Runs) -> str:
    """Every cell at its best rate, with the width of its range of rates."""
    head = "task | base | method | rank | trained | rate | test loss | right | octaves"
    rows = [f"| {head} | diverged |", "| --- " * 10 + "|"]
    for cell in runs.cells:
        lines, curve = runs.best(cell), runs.curve(cell)
        losses = [line["test_loss"] for line in lines]
        right = np.mean([line["right"] for line in lines])
        every = [line for line in runs.lines if Cell(**line["cell"]) == cell]
        failed = [line for line in every if line.get("diverged", True)]
        name = cell.method + (" (equal parameters)" if cell.equal_to else "")
        name += f" ({cell.steps} steps)" if cell.steps != STEPS else ""
        full = not cell.equal_to and cell.steps == STEPS
        width = f"{octaves_within([*curve], [*curve.values()]):.1f}" if full else "-"
        rows.append(
            f"| {cell.task} | {cell.base} | {name} | {cell.rank or '-'} | "
            f"{lines[0]['trainable']:,} | {lines[0]['rate']:.2g} | "
            f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f} (n = {len(lines)}) "
            f"| {right:.3f} | {width} | {len(failed)} of {len(every)} |"
        )
    return "\n".join(rows)


def comparisons(runs: Runs, first: str, second: str) -> str:
    """Differences of two methods by task, base and rank, with their verdicts."""
    compared: list[tuple[str, Difference]] = []
    for task, base, rank in product(TASKS, BASES, RANKS):
        ours = Cell(task, base, first, rank)
        others = {
            second: Cell(task, base, second, rank),
            f"{second}, equal parameters": Cell(task, base, second, rank, rank),
            f"{second}, equal time": Cell(task, base, second, rank, 0, STEPS + 5),
        }
        for name, other in others.items():
            if (result := runs.compare(ours, other)) is not None:
                compared.append((f"{task} | {base} | {rank} | {name}", result))
    corrected = holm([result.p for _, result in compared])
    rows = [f"| task | base | rank | {first} against | difference | verdict |"]
    rows.append("| --- " * 6 + "|")
    rows += [
        f"| {name} | {r.mean:+.1%} ({r.low:+.1%} to {r.high:+.1%}) | {r.verdict(p)} |"
        for (name, r), p in zip(compared, corrected, strict=True)
    ]
    return "\n".join(rows)


def geometry(runs: Runs) -> str:
    """Spearman's correlation of each geometric measure with the test loss, by task."""
    rows = ["| task | base | runs | ΔM | ΔD | correlation of both | effective rank |"]
    rows.append("| --- " * 7 + "|")
    for task, base in product(TASKS, BASES):
        lines = [
            line
            for line in runs.lines
            if "geometry" in line
            and (line["cell"]["task"], line["cell"]["base"]) == (task, base)
        ]
        if len(lines) < 5:
            continue
        values = np.array([[*line["geometry"].values()] for line in lines])
        both = [np.corrcoef(run[:, 0], run[:, 1])[0, 1] for run in values]
        means = values.mean(axis=1)
        losses = [line["test_loss"] for line in lines]
        cells = [
            f"{spearman(column, np.array(losses)):+.2f}"
            for column in (means[:, 0], means[:, 1], np.array(both), means[:, 2])
        ]
        rows.append(f"| {task} | {base} | {len(lines)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(runs: Runs, folder: Path) -> None:
    """Draw the validation loss over learning rates of every task and base."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    colors: dict[str, str] = {}
    colors |= zip(RANKED, ("#1f6fb4", "#c8501e", "#4a8a3a"), strict=True)
    for task, base in product(TASKS, BASES):
        cells = [
            cell
            for cell in runs.cells
            if (cell.task, cell.base, cell.equal_to, cell.steps)
            == (task, base, 0, STEPS)
        ]
        if not cells:
            continue
        figure, axes = plt.subplots(1, len(RANKS), figsize=(10, 3.2), sharey=True)
        for axis, rank in zip(axes, RANKS, strict=True):
            for cell in cells:
                if cell.rank in (0, rank):
                    curve = {p: v for p, v in runs.curve(cell).items() if v < 1e3}
                    rates = [cell.rate(place) for place in curve]
                    color = colors.get(cell.method, "#777777")
                    style = "--" if cell.method == "magnitude" else "-"
                    axis.plot(
                        rates, [*curve.values()], style, color=color, label=cell.method
                    )
            axis.set(title=f"rank {rank}", xscale="log", xlabel="learning rate")
        axes[0].set_ylabel("validation loss")
        axes[-1].legend(fontsize="small")
        figure.suptitle(f"{task}, {base} base")
        figure.tight_layout()
        figure.savefig(folder / f"when-{task}-{base}.svg", metadata={"Date": None})
        plt.close(figure)


def _loss(line: Line) -> float:
    return float("inf") if line["valid_loss"] is None else line["valid_loss"]


@click.command(help=__doc__)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--figures", type=click.Path(path_type=Path))
def main(results: Path, figures: Path | None) -> None:
    lines = [json.loads(text) for text in results.read_text().splitlines()]
    runs = Runs(lines)
    hours = sum(line["cpu_seconds"] for line in lines) / 3600
    failed = sum(line["valid_loss"] is None for line in lines)
    click.echo(f"{len(lines)} runs, {failed} failed, {hours:.1f} core-hours\n")
    click.echo(cells_table(runs))
    for first, second in (("dora", "lora"), ("dora", "direction")):
        click.echo(f"\n{comparisons(runs, first, second)}")
    click.echo(f"\n{geometry(runs)}")
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        draw(runs, figures)


if __name__ == "__main__":
    main()
