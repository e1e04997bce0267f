"""Merge combinations of real adapters by every method, and test what compare advises.

    python benchmarks/merge_grid.py --work FOLDER \
        --task spam data/spam --task dialogue data/chitchat
    python benchmarks/merge_grid.py --table FOLDER/merge_grid.jsonl

Trains the adapters of `ADAPTERS` on SmolLM2-135M (the last six blocks), merges every
combination of `COMBINATIONS` by every method, and measures the loss of each task of the
combination on test rows. It notes what `compare_adapters` advises, and what
``--method auto --data`` chooses by validation rows. Docstrings, sums, records and
sorting are made by `_made_tasks`; the other tasks are data folders. The frozen blocks
are computed once per row, and the tokens that a task's rows begin with once per merge.
Everything is kept in FOLDER and nothing is computed twice, so an interrupted run
continues where it stopped. Several runs can work in one folder at a time, each on its
``--share``, with ``--trained-only`` or ``--train-only``. ``--table`` prints the tables
of ``docs/merging.md``.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import click
from _grid_entries import (
    ADAPTERS,
    HELD_OUT,
    Contender,
    Recipe,
    contenders,
    schedule,
)
from _grid_table import ADVICE, ALONE, AUTO, BASE, TRAINED, tables
from _made_tasks import write_tasks
from _trunk import Row, Trunk, count_targets, mean_loss, target_loss

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import remove_dora
from mlx_dora.analyze.compare import compare_adapters
from mlx_dora.data.loading import load_datasets
from mlx_dora.demo.model import demo_model
from mlx_dora.evaluate.loss import LossResult
from mlx_dora.merge.adapters.merge import merge_adapters_report
from mlx_dora.merge.choice.choose import choose_by
from mlx_dora.merge.fisher.config import FisherConfig
from mlx_dora.merge.fisher.estimate import write_fisher
from mlx_dora.merge.methods import METHODS
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.run.finetune import finetune

BLOCKS, LENGTH, BATCH = 6, 112, 4
ROWS = {"train": 160, "valid": 8, "test": 12}


@dataclass
class Grid:
    """The base, the rows that were read, and the files of a run."""

    work: Path
    model: Any
    tokenizer: Any
    trunk: Trunk
    folders: dict[str, Path]
    lines: list[dict[str, Any]] = field(default_factory=list)
    known: dict[tuple[str, str], list[Row]] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        """The file of results."""
        return self.work / "merge_grid.jsonl"

    def rows(self, task: str, split: str) -> list[Row]:
        """Return the rows of a split of a task."""
        if (task, split) not in self.known:
            found = read_rows(self.folders[task], split, self.tokenizer)
            self.known[task, split] = found
        return self.known[task, split]

    def is_trained(self, name: str) -> bool:
        """Whether an adapter is in the folder."""
        return (self.work / "adapters" / name).exists()

    def adapter(self, name: str) -> Adapter:
        """Return an adapter, trained if it is not in the folder yet."""
        folder, recipe = self.work / "adapters" / name, ADAPTERS[name]
        if not self.is_trained(name):
            started, unfinished = time.process_time(), folder.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)
            self._train(recipe, unfinished)
            unfinished.rename(folder)
            self._note((name,), TRAINED, {}, time.process_time() - started)
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
            self.rows(recipe.task, "train"),
            None,
            train=config,
            dora=DoRAConfig(rank=recipe.rank, scale=2.0, num_layers=BLOCKS),
            adapter_path=folder,
            loss=target_loss(self.trunk.frozen),
            batches=self.trunk.batches(),
        )

    def loss(self, adapter: Adapter | None, task: str, split: str = "test") -> float:
        """Return the task's mean loss on the rows of a split."""
        (loss,) = self.losses(adapter, [task], split)
        return loss

    def losses(
        self, adapter: Adapter | None, tasks: Sequence[str], split: str
    ) -> list[float]:
        """Return each task's mean loss on the rows of a split."""
        if adapter is not None:
            attach_adapter(self.model, adapter, check_base=False)
        try:
            every = [self.rows(task, split) for task in tasks]
            return [mean_loss(self.model, self.trunk, rows) for rows in every]
        finally:
            remove_dora(self.model)

    def run(self, names: tuple[str, ...], number: int) -> None:
        """Measure the contenders of a pass that have no result yet."""
        tasks = sorted({ADAPTERS[name].task for name in names})
        if not self.has(names, BASE):
            self._measure(names, BASE, lambda: None, tasks)
        if not self.has(names, ALONE):
            own = {ADAPTERS[n].task: self.adapter(n) for n in reversed(names)}
            started = time.process_time()
            losses = {task: self.loss(adapter, task) for task, adapter in own.items()}
            self._note(names, ALONE, losses, time.process_time() - started)
        if not self.has(names, ADVICE):
            self.advise(names)
        of = [ADAPTERS[name].task for name in names]
        passes = contenders(names)
        for contender in passes[number] if number < len(passes) else ():
            if self.has(names, contender.name):
                continue
            fisher = None
            if contender.method == "fisher":
                fisher = [self.fisher(name) for name in names]
            merge = partial(
                contender.merge,
                [self.adapter(name) for name in names],
                of,
                self.model,
                fisher,
            )
            settings = {k: v for k, v in asdict(contender).items() if v}
            self._measure(names, contender.name, merge, tasks, settings)

    def has(self, names: tuple[str, ...], contender: str) -> bool:
        """Whether there is a result."""
        key = (names, contender)
        return any((tuple(x["of"]), x["contender"]) == key for x in self.lines)

    def _measure(
        self,
        names: tuple[str, ...],
        contender: str,
        merge: Callable[[], Adapter | None],
        tasks: Sequence[str],
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Merge, measure the test rows, and note the result and the processor time."""
        started = time.process_time()
        losses = self.losses(merge(), tasks, "test")
        used = time.process_time() - started
        self._note(
            names, contender, dict(zip(tasks, losses, strict=True)), used, settings
        )

    def fisher(self, name: str) -> Path:
        """Estimate the Fisher information of an adapter on 16 training rows, once."""
        folder, recipe = self.work / "fisher" / name, ADAPTERS[name]
        if not folder.exists():
            data = str(self.folders[recipe.task])
            config = FisherConfig(data=data, num_batches=4, max_seq_length=LENGTH)
            adapter = self.work / "adapters" / name
            folder.parent.mkdir(exist_ok=True)
            write_fisher(self.work / "model", folder, adapter=adapter, config=config)
        return folder

    def choose(self, names: tuple[str, ...]) -> None:
        """Note what ``--method auto --data`` chooses by validation rows."""
        if self.has(names, AUTO):
            return
        tasks = sorted({ADAPTERS[name].task for name in names})

        def measure(adapter: Adapter | None, _: str) -> list[LossResult]:
            losses = self.losses(adapter, tasks, "valid")
            return [
                LossResult(
                    loss=loss,
                    rows=len(self.rows(task, "valid")),
                    tokens=count_targets(self.rows(task, "valid")),
                )
                for task, loss in zip(tasks, losses, strict=True)
            ]

        started = time.process_time()
        choice = choose_by(
            [self.adapter(name) for name in names],
            model=self.model,
            names=names,
            tasks=[(task, "valid") for task in tasks],
            measure=measure,
        )
        best = choice.best.candidate
        merged = merge_adapters_report(
            [self.adapter(name) for name in names],
            model=self.model,
            method=best.method,
            weights=best.weights,
            check_base=False,
            options=best.options(0),
        ).adapter
        losses = dict(zip(tasks, self.losses(merged, tasks, "test"), strict=True))
        facts = {
            "chosen": best.name,
            "valid_base": [round(loss, 4) for loss in choice.base],
            "valid_alone": [[round(x, 4) for x in own] for own in choice.alone],
            "tried": {
                trial.candidate.name: [round(loss, 4) for loss in trial.losses]
                for trial in choice.trials
            },
            "worst_share": round(choice.score(choice.best), 4),
            "warns_of": [tasks[i] for i in choice.worse],
        }
        self._note(names, AUTO, losses, time.process_time() - started, facts)

    def advise(self, names: tuple[str, ...]) -> None:
        """Note what `compare_adapters` advises for a combination."""
        folders = [self.work / "adapters" / name for name in names]
        started = time.process_time()
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
        measures = ("update_cosine", "relative_size", "size_ratio")
        facts |= {
            name: [[round(float(v), 4) for v in row] for row in comparison.matrix(name)]
            for name in measures
        }
        self._note(names, ADVICE, {}, time.process_time() - started, facts)

    def _note(
        self,
        names: tuple[str, ...],
        contender: str,
        losses: Mapping[str, float],
        seconds: float,
        settings: dict[str, Any] | None = None,
    ) -> None:
        line = {
            "of": [*names],
            "contender": contender,
            **(settings or {}),
            "cpu_seconds": round(seconds, 2),
            "tasks": {task: {"test": round(loss, 4)} for task, loss in losses.items()},
        }
        self.lines.append(line)
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        click.echo(f"{' + '.join(names)}: {contender}: {line['tasks']}", err=True)


def open_grid(work: Path, tasks: Sequence[tuple[str, str]]) -> Grid:
    """Load the base and the rows, and the results that are there."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model").exists():
        (work / "model").symlink_to(demo_model())
    model: Any
    model, tokenizer = load(str(work / "model"))
    folders = write_tasks(work / "data") | {name: Path(f) for name, f in tasks}
    if lacking := {recipe.task for recipe in ADAPTERS.values()} - folders.keys():
        raise click.ClickException(f"give the data of {', '.join(sorted(lacking))}.")
    trunk = Trunk(model, len(model.layers) - BLOCKS)
    grid = Grid(work, model, tokenizer, trunk, folders)
    grid.lines = read_lines(grid.results)
    return grid


def read_rows(folder: Path, split: str, tokenizer: Any) -> list[Row]:
    """Return the first rows of a split that have at most `LENGTH` tokens."""
    config = TrainConfig(data=str(folder), mask_prompt=True)
    data = load_datasets(config, tokenizer, (split,))[split]
    if data is None:
        raise click.ClickException(f"{folder} has no {split}.jsonl.")
    examples = (data[i] for i in range(len(data)))
    short = (
        (tokens, first)
        for tokens, first in examples
        if isinstance(first, int) and len(tokens) <= LENGTH
    )
    return [*islice(short, ROWS[split])]


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
@click.option("--train-only", is_flag=True, help="Train the adapters, merge nothing.")
@click.option(
    "--share",
    type=(int, int),
    default=(0, 1),
    help="I N: only every N-th adapter or combination, from the I-th (0 is the first).",
)
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
    train_only: bool,
    share: tuple[int, int],
    advice: bool,
    table: Path | None,
) -> None:
    if table is not None:
        click.echo("\n".join(tables(read_lines(table), HELD_OUT)))
        return
    if work is None:
        raise click.UsageError("give --work or --table")
    grid = open_grid(work, tasks)
    if train_only:
        for name in [*ADAPTERS][share[0] :: share[1]]:
            grid.adapter(name)
        return
    click.echo(f"BLAS: {bench.BLAS.state}", err=True)
    started = time.perf_counter()
    for number, names in schedule(share):
        if trained_only and not all(map(grid.is_trained, names)):
            continue
        if minutes is not None and time.perf_counter() - started > 60 * minutes:
            click.echo("stopped by --minutes; run again to continue.", err=True)
            return
        if advice:
            if number == 0:
                grid.advise(names)
        elif number == AUTO:
            grid.choose(names)
        else:
            grid.run(names, number)


if __name__ == "__main__":
    main()
