"""Tables and figures of the study, from its results.

    python benchmarks/when/report.py [--figures docs/studies]

Prints Markdown, also while runs are missing, and says how many. With ``--figures``, it
also draws the mean validation loss over learning rates, by task and base, and the test
loss over measures of how the weights changed, as SVG.
"""

from pathlib import Path

import click
import numpy as np
from decide import octaves_within
from draw import Panel, Plot
from grid import BASES, RANKS, STEPS, TABLES, TASKS, Cell
from hypotheses import (
    MEASURES,
    entropy,
    geometry,
    low_ranks,
    measured,
    packed_bases,
    same_cost,
    same_rank,
    table,
    widths,
)
from reward_grid import read
from rewards import reward_tables
from runs import Runs, is_lost, read_lines

RESULTS = Path(__file__).parents[1] / "results"


def cells_table(runs: Runs) -> str:
    """Every cell at its best rate, with the width of its range of rates."""
    head = "task | base | method | rank | trained | rate | test loss | right | octaves"
    rows = [f"| {head} | diverged |", "| --- " * 10 + "|"]
    for cell in runs.cells:
        lines, every = runs.best(cell), runs.of(cell)
        failed = sum(map(is_lost, every))
        full = not cell.equal_to and cell.steps == STEPS
        name = cell.method + (" (equal parameters)" if cell.equal_to else "")
        name += f" ({cell.steps} steps)" if cell.steps != STEPS else ""
        name += "" if runs.is_complete(cell) else " *(runs are missing)*"
        start = f"| {cell.task} | {cell.base} | {name} | {cell.rank or '-'} | "
        end = f"| {failed} of {len(every)} |"
        if not lines:
            rows.append(f"{start}- | - | failed at every rate | - | - {end}")
            continue
        losses = [line["test_loss"] for line in lines]
        spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
        right = np.mean([line["right"] for line in lines])
        curve = runs.curve(cell)
        width = f"{octaves_within([*curve], [*curve.values()]):.1f}" if full else "-"
        rows.append(
            f"{start}{lines[0]['trainable']:,} | {lines[0]['rate']:.2g} | "
            f"{np.mean(losses):.4f}{spread} (n = {len(lines)}) | {right:.3f} | "
            f"{width} {end}"
        )
    return "\n".join(rows)


def figures(runs: Runs, folder: Path) -> list[Path]:
    """Draw the validation loss over learning rates; return the files."""
    files = []
    for task, base in TABLES:
        of = [Cell(task, base, cell.method, cell.rank) for cell in runs.cells]
        cells = {cell for cell in of if cell in runs.cells}
        panels = [
            Panel(
                f"rank {rank}",
                {
                    cell.method: [
                        (cell.rate(place), loss)
                        for place, loss in runs.curve(cell).items()
                    ]
                    for cell in sorted(cells)
                    if cell.rank in (0, rank)
                },
            )
            for rank in RANKS
        ]
        losses = [loss for cell in cells for loss in runs.curve(cell).values()]
        if not losses:
            continue
        best = min(losses)
        untrained = max(runs.of(cell)[0]["untrained_loss"] for cell in cells)
        most = min(untrained, 3 * best)
        missing = sum(not runs.is_complete(cell) for cell in cells)
        title = f"{task}, {base} base" + (" (runs are missing)" if missing else "")
        file = folder / f"when-{task}-{base}.svg"
        plot = Plot(title, "learning rate", "validation loss", most)
        file.write_text(plot.draw(panels))
        files.append(file)
    return files


def geometry_figures(runs: Runs, folder: Path) -> list[Path]:
    """Draw the test loss over measures of the change; return the files."""
    files = []
    for name, measure in (
        ("correlation", "correlation of ΔM and ΔD"),
        ("entropy", "mean entropy"),
    ):
        panels = []
        for task in TASKS:
            points: dict[str, list[tuple[float, float]]] = {}
            for base in BASES:
                lines = measured(runs, task, base)
                best = min((line["test_loss"] for line, _ in lines), default=1.0)
                for line, values in lines:
                    if np.isfinite(x := MEASURES[measure](values)):
                        point = x, line["test_loss"] / best
                        points.setdefault(line["cell"]["method"], []).append(point)
            panels.append(Panel(task, points))
        if not any(panel.points for panel in panels):
            continue
        plot = Plot(
            "Geometry and quality", measure, "test loss ÷ best", 2.0, is_curve=False
        )
        file = folder / f"when-{name}.svg"
        file.write_text(plot.draw(panels))
        files.append(file)
    return files


@click.command(help=__doc__)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=RESULTS,
    help="Folder of when.jsonl and when_reward.jsonl.",
)
@click.option("--figures", "folder", type=click.Path(path_type=Path))
def main(results: Path, folder: Path | None) -> None:
    runs = Runs(read_lines(results / "when.jsonl"))
    click.echo(f"{runs.progress()}\n\n{cells_table(runs)}")
    three = "task | base | rank"
    for title, head, compared in (
        ("H1: DoRA and LoRA of the same rank", three, same_rank(runs, "dora", "lora")),
        ("H2: DoRA and LoRA of the same cost", "task | equal | rank", same_cost(runs)),
        ("H3: gain at rank 1 less gain at rank 16", "task | base", low_ranks(runs)),
        ("H4: gain in 4 bits less gain dense", "task | rank", packed_bases(runs)),
        ("H6: DoRA and direction only", three, same_rank(runs, "dora", "direction")),
    ):
        click.echo(f"\n## {title}\n\n{table(head, [*compared])}")
    click.echo(f"\n## H5: octaves of rates within 1 %\n\n{widths(runs)}")
    click.echo(f"\n## H7: geometry and test loss\n\n{geometry(runs)}")
    click.echo(f"\n## Entropy of the singular values\n\n{entropy(runs)}")
    rewards = reward_tables(read(results / "when_reward.jsonl"))
    click.echo(f"\n## H8: rewards under GRPO\n\n{rewards}")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (*figures(runs, folder), *geometry_figures(runs, folder)):
            click.echo(f"drawn: {file}", err=True)


if __name__ == "__main__":
    main()
