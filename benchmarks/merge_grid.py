"""Merge combinations of real adapters by every method, and test what compare advises.

    python benchmarks/merge_grid.py --work FOLDER \
        --task spam data/spam --task dialogue data/chitchat
    python benchmarks/merge_grid.py --table FOLDER/merge_grid.jsonl

Trains the adapters of `ADAPTERS` on SmolLM2-135M (the last six blocks), merges every
combination of `COMBINATIONS` by every method, and measures the loss of each task of the
combination on validation and test rows. Docstrings, sums and records are made by
`_made_tasks`; the other tasks are data folders. The frozen blocks are computed once per
row. Everything is kept in FOLDER and nothing is computed twice, so an interrupted run
continues where it stopped. ``--table`` prints
the tables of ``docs/merging.md``.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
from _grid_entries import ADAPTERS, COMBINATIONS, Contender, Recipe, contenders
from _grid_table import ADVICE, ALONE, BASE, tables
from _made_tasks import write_tasks
from _trunk import Row, Trunk, run_blocks, target_loss

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import remove_dora
from mlx_dora.analyze.compare import compare_adapters
from mlx_dora.data.loading import load_datasets
from mlx_dora.demo.model import demo_model
from mlx_dora.evaluate.loss import eval_mode
from mlx_dora.merge.methods import METHODS
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.run.finetune import finetune

BLOCKS, LENGTH, BATCH = 6, 112, 4
ROWS = {"train": 160, "valid": 6, "test": 12}
SPLITS = ("valid", "test")


@dataclass
class Grid:
    """The base, the rows of every task, and the files of a run."""

    work: Path
    model: Any
    tokenizer: Any
    rows: dict[str, dict[str, list[Row]]]
    trunk: Trunk
    splits: tuple[str, ...] = SPLITS
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def results(self) -> Path:
        """The file of results."""
        return self.work / "merge_grid.jsonl"

    def is_trained(self, name: str) -> bool:
        """Whether an adapter is in the folder."""
        return (self.work / "adapters" / name).exists()

    def adapter(self, name: str) -> Adapter:
        """Return an adapter, trained if it is not in the folder yet."""
        folder, recipe = self.work / "adapters" / name, ADAPTERS[name]
        if not self.is_trained(name):
            started, unfinished = time.perf_counter(), folder.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)
            self._train(recipe, unfinished)
            unfinished.rename(folder)
            click.echo(f"{name}: {time.perf_counter() - started:.0f} s", err=True)
        return load_adapter(folder)

    def _train(self, recipe: Recipe, folder: Path) -> None:
        model, tokenizer = load(str(self.work / "model"))
        config = TrainConfig(
            fine_tune_type=recipe.kind,  # pyright: ignore[reportArgumentType]
            seed=recipe.seed,
            batch_size=BATCH,
            iters=recipe.iters,
            learning_rate=5e-4,
            optimizer_config={"adam": {"bias_correction": recipe.bias_correction}},
            steps_per_report=recipe.iters,
            save_every=recipe.iters,
            mask_prompt=True,
            max_seq_length=LENGTH,
            val_batches=0,
        )
        finetune(
            model,
            tokenizer,
            self.rows[recipe.task]["train"],
            None,
            train=config,
            dora=DoRAConfig(rank=recipe.rank, scale=2.0, num_layers=BLOCKS),
            adapter_path=folder,
            loss=target_loss(self.trunk.frozen),
            batches=self.trunk.batches(),
        )

    def losses(
        self, adapter: Adapter | None, task: str, splits: Sequence[str] = ()
    ) -> dict[str, float]:
        """Return the task's loss on the rows of some splits; of all by default."""
        if adapter is not None:
            attach_adapter(self.model, adapter, check_base=False)
        rows = self.rows[task]
        try:
            return {
                split: round(mean_loss(self.model, self.trunk, rows[split]), 4)
                for split in splits or self.splits
            }
        finally:
            remove_dora(self.model)

    def run(self, names: tuple[str, ...], number: int) -> None:
        """Measure the contenders of a pass that have no result yet.

        All but the first pass measure only the test rows.
        """
        adapters = [self.adapter(name) for name in names]
        done = {(tuple(line["of"]), line["contender"]) for line in self.lines}
        tasks = sorted({ADAPTERS[name].task for name in names})
        if (names, BASE) not in done:
            self._note(names, BASE, {t: self.losses(None, t) for t in tasks}, 0.0)
        if (names, ALONE) not in done:
            own: dict[str, dict[str, float]] = {}
            for name, adapter in zip(names, adapters, strict=True):
                own.setdefault(
                    ADAPTERS[name].task, self.losses(adapter, ADAPTERS[name].task)
                )
            self._note(names, ALONE, own, 0.0)
        of = [ADAPTERS[name].task for name in names]
        splits = self.splits if number == 0 else ("test",)
        for contender in contenders(of)[number]:
            if (names, contender.name) in done:
                continue
            started = time.perf_counter()
            merged = contender.merge(adapters, of, self.model)
            seconds = time.perf_counter() - started
            tasks_of = {task: self.losses(merged, task, splits) for task in tasks}
            settings = {k: v for k, v in asdict(contender).items() if v}
            self._note(names, contender.name, tasks_of, seconds, settings)

    def advise(self, names: tuple[str, ...]) -> None:
        """Note what `compare_adapters` advises for a combination."""
        folders = [self.work / "adapters" / name for name in names]
        if not all(map(self.is_trained, names)):
            return
        comparison = compare_adapters(folders, self.model, check_base=False)
        advice = next((a for a in comparison.guidance if a.method), None)
        facts: dict[str, Any] = {"advised": None}
        if advice is not None and advice.method is not None and advice.weights:
            # Of two adapters, slerp is karcher.
            method = "karcher" if advice.method == "slerp" else advice.method
            contender = Contender(method, space=advice.space)
            if not METHODS[method].is_mean:
                contender = replace(contender, total=sum(advice.weights))
            facts = {"advised": contender.name, "rule": advice.rule}
        measures = ("update_cosine", "input_overlap", "output_overlap", "size_ratio")
        facts |= {
            name: [[round(float(v), 4) for v in row] for row in comparison.matrix(name)]
            for name in measures
        }
        self._note(names, ADVICE, {}, 0.0, facts)

    def _note(
        self,
        names: tuple[str, ...],
        contender: str,
        tasks: dict[str, dict[str, float]],
        seconds: float,
        settings: dict[str, Any] | None = None,
    ) -> None:
        line = {
            "of": [*names],
            "contender": contender,
            **(settings or {}),
            "merge_seconds": round(seconds, 2),
            "tasks": tasks,
        }
        self.lines.append(line)
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        test = {task: values["test"] for task, values in tasks.items()}
        click.echo(f"{' + '.join(names)}: {contender}: {test}", err=True)


def open_grid(work: Path, tasks: Sequence[tuple[str, str]]) -> Grid:
    """Load the base and the rows, and the results that are there."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model").exists():
        (work / "model").symlink_to(demo_model())
    model: Any
    model, tokenizer = load(str(work / "model"))
    folders = write_tasks(work / "data") | {name: Path(f) for name, f in tasks}
    rows = {
        name: read_rows(folder, tokenizer)
        for name, folder in folders.items()
    }  # fmt: skip
    if lacking := {recipe.task for recipe in ADAPTERS.values()} - rows.keys():
        raise click.ClickException(f"give the data of {', '.join(sorted(lacking))}.")
    grid = Grid(work, model, tokenizer, rows, Trunk(model, len(model.layers) - BLOCKS))
    grid.lines = read_lines(grid.results)
    return grid


def mean_loss(model: Any, trunk: Trunk, rows: Sequence[Row]) -> float:
    """Return the mean loss of the rows' targets; only their logits are computed."""
    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row[0]))
    with eval_mode(model):
        for start in range(0, len(ordered), 8):
            some = ordered[start : start + 8]
            hidden = trunk.activations([tokens[:-1] for tokens, _ in some])
            last = run_blocks(model.model.layers[trunk.frozen :], hidden)
            places = [
                last[row, first - 1 : len(tokens) - 1]
                for row, (tokens, first) in enumerate(some)
            ]
            targets = mx.array([t for tokens, first in some for t in tokens[first:]])
            logits = model.model.embed_tokens.as_linear(
                model.model.norm(mx.concatenate(places))
            )
            total += float(nn.losses.cross_entropy(logits, targets).sum())
            count += targets.size
    return total / count


def read_rows(folder: Path, tokenizer: Any) -> dict[str, list[Row]]:
    """Return the rows of each split that have at most `LENGTH` tokens."""
    config = TrainConfig(data=str(folder), mask_prompt=True)
    rows: dict[str, list[Row]] = {}
    for split, data in load_datasets(config, tokenizer, tuple(ROWS)).items():
        if data is None:
            raise click.ClickException(f"{folder} has no {split}.jsonl.")
        every = (data[i] for i in range(len(data)))
        short = [
            (tokens, first)
            for tokens, first in every
            if isinstance(first, int) and len(tokens) <= LENGTH
        ]
        rows[split] = short[: ROWS[split]]
    return rows


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the results in a file, if it exists."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--task", "tasks", nargs=2, multiple=True, help="Name and data folder.")
@click.option("--minutes", type=float, help="Stop after this many minutes.")
@click.option(
    "--trained-only", is_flag=True, help="Train nothing; leave out combinations."
)
@click.option("--test-only", is_flag=True, help="Measure no validation rows.")
@click.option(
    "--advice", is_flag=True, help="Add what compare advises for each combination."
)
@click.option(
    "--table",
    type=click.Path(path_type=Path, exists=True),
    help="Print the tables of a file of results, and run nothing.",
)
def main(
    work: Path | None,
    tasks: tuple[tuple[str, str], ...],
    minutes: float | None,
    trained_only: bool,
    test_only: bool,
    advice: bool,
    table: Path | None,
) -> None:
    if table is not None:
        click.echo("\n".join(tables(read_lines(table))))
        return
    if work is None:
        raise click.UsageError("give --work or --table")
    grid = open_grid(work, tasks)
    if test_only:
        grid.splits = ("test",)
    click.echo(f"BLAS: {bench.BLAS.state}", err=True)
    started = time.perf_counter()
    passes = range(len(contenders(["any"])))
    for number, names in product(passes, COMBINATIONS):
        if trained_only and not all(map(grid.is_trained, names)):
            continue
        if minutes is not None and time.perf_counter() - started > 60 * minutes:
            click.echo("stopped by --minutes; run again to continue.", err=True)
            return
        if advice and number == 0:
            grid.advise(names)
        elif advice:
            return
        else:
            grid.run(names, number)


if __name__ == "__main__":
    main()
