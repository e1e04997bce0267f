"""Merge the three adapters of docs/merging.md at rank 8, as advised and as data choose.

    python benchmarks/merge_three.py --work FOLDER --task docstrings data/docstrings \
        --task spam data/spam --task chat data/chitchat

Trains the adapters (SmolLM2-135M, the last eight blocks; docstrings: rank 8, 40 steps;
spam: rank 8, 60 steps; chat: rank 4, 40 steps on all tokens), lets ``--method auto``
choose without data and by 8 validation rows a task, and measures these merges, some
others, the base and the adapters on test rows. ``--correct-bias`` trains by Adam with
bias correction, which MLX leaves out by default. Results are JSON lines in FOLDER;
what is there is not computed again.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from _grid_entries import Contender
from _trunk import Row, Trunk, count_targets, mean_loss, target_loss
from merge_grid import read_lines

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
from mlx_dora.merge.choice.candidates import Candidate
from mlx_dora.merge.choice.choose import choose_by
from mlx_dora.merge.methods import METHODS
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.run.finetune import finetune

BLOCKS, LENGTH, BATCH, RANK = 8, 128, 4, 8
RECIPES = {"docstrings": (8, 40), "spam": (8, 60), "chat": (4, 40)}
"""Rank and number of steps."""
WHOLE = ("chat",)
"""Tasks of which all tokens count."""
VALID = 8


@dataclass
class Three:
    """The base, the data of the tasks, and the results of a run."""

    work: Path
    folders: dict[str, str]
    corrects: bool
    test: int
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model, self.tokenizer = self._base()
        self.trunk = Trunk(self.model, len(self.model.layers) - BLOCKS)
        self.results = self.work / "merge_three.jsonl"
        self.lines = read_lines(self.results)
        self._rows: dict[tuple[str, str], list[Row]] = {}

    def _base(self) -> tuple[Any, Any]:
        return load(str(demo_model()))

    def rows(self, task: str, split: str, most: int) -> list[Row]:
        """Short rows of a split; to measure whole texts, their beginnings."""
        if (task, split) not in self._rows:
            is_whole = task in WHOLE
            config = TrainConfig(data=self.folders[task], mask_prompt=not is_whole)
            data = load_datasets(config, self.tokenizer, (split,))[split]
            if data is None:
                raise click.ClickException(
                    f"{self.folders[task]} has no {split}.jsonl."
                )
            rows: list[Row] = []
            for i in range(len(data)):
                tokens, first = data[i]
                if len(tokens) <= LENGTH or (is_whole and split != "train"):
                    rows.append((tokens[:LENGTH], max(first, 1)))
                if len(rows) == most:
                    break
            self._rows[task, split] = rows
        return self._rows[task, split]

    def adapter(self, task: str) -> Adapter:
        """Return the adapter of a task, trained if it is not in the folder yet."""
        folder = self.work / task
        if not folder.exists():
            rank, iters = RECIPES[task]
            unfinished = folder.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)
            model, tokenizer = self._base()
            adam = {"adam": {"bias_correction": True}} if self.corrects else {}
            finetune(
                model,
                tokenizer,
                self.rows(task, "train", BATCH * iters),
                None,
                train=TrainConfig(
                    batch_size=BATCH,
                    iters=iters,
                    learning_rate=5e-4,
                    optimizer_config=adam,
                    steps_per_report=10,
                    save_every=iters,
                    mask_prompt=task not in WHOLE,
                    max_seq_length=LENGTH,
                    val_batches=0,
                ),
                dora=DoRAConfig(rank=rank, scale=2.0, num_layers=BLOCKS),
                adapter_path=unfinished,
                loss=target_loss(self.trunk.frozen),
                batches=self.trunk.batches(),
            )
            unfinished.rename(folder)
            click.echo(f"trained {task}", err=True)
        return load_adapter(folder)

    def losses(self, adapter: Adapter | None, split: str) -> list[float]:
        """Mean loss on rows of each task."""
        most = VALID if split == "valid" else self.test
        if adapter is not None:
            attach_adapter(self.model, adapter, check_base=False)
        try:
            return [
                mean_loss(self.model, self.trunk, self.rows(task, split, most))
                for task in RECIPES
            ]
        finally:
            remove_dora(self.model)

    def measure(self, name: str, adapter: Adapter | None, **facts: Any) -> None:
        """Measure the test rows, and note the result."""
        started = time.process_time()
        losses = self.losses(adapter, "test")
        line = {
            "contender": name,
            **facts,
            "rows": self.test,
            "losses": [round(loss, 4) for loss in losses],
            "mean": round(sum(losses) / len(losses), 4),
            "cpu_seconds": round(time.process_time() - started, 1),
        }
        self.lines.append(line)
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        click.echo(f"{name}: {line['losses']}, mean {line['mean']}", err=True)

    def advised(self) -> Contender:
        """What `compare_adapters` advises."""
        folders = [self.work / task for task in RECIPES]
        guidance = compare_adapters(folders, self.model, check_base=False).guidance
        advice = next(one for one in guidance if one.method)
        assert advice.method is not None
        total = None
        if not METHODS[advice.method].is_mean and advice.weights:
            total = sum(advice.weights)
        return Contender(advice.method, space=advice.space, total=total, rank=RANK)

    def chosen(self, adapters: list[Adapter]) -> tuple[Candidate, int]:
        """What ``--method auto --data`` chooses by validation rows, and the trials."""

        def measure(adapter: Adapter | None, name: str) -> list[LossResult]:
            rows = [self.rows(task, "valid", VALID) for task in RECIPES]
            losses = self.losses(adapter, "valid")
            click.echo(f"valid, {name}: {[round(x, 3) for x in losses]}", err=True)
            return [
                LossResult(loss=loss, rows=len(some), tokens=count_targets(some))
                for loss, some in zip(losses, rows, strict=True)
            ]

        choice = choose_by(
            adapters,
            model=self.model,
            names=[*RECIPES],
            tasks=[(task, "valid") for task in RECIPES],
            measure=measure,
            rank=RANK,
        )
        return choice.best.candidate, len(choice.trials)

    def run(self) -> None:
        """Measure what has no result yet."""
        adapters = [self.adapter(task) for task in RECIPES]
        done = {line["contender"] for line in self.lines}
        count = len(adapters)
        tsv = Contender("tsv", space="core", rank=RANK)
        contenders = {
            "karcher": Contender("karcher", rank=RANK),
            "tsv, sum √N": replace(tsv, total=count**0.5),
            "tsv, sum N": replace(tsv, total=float(count)),
            "task_arithmetic, sum √N": Contender(
                "task_arithmetic", total=count**0.5, rank=RANK
            ),
        }
        advised = self.advised()
        for name, one in contenders.items():
            if name not in done:
                merged = one.merge(adapters, [*RECIPES], self.model)
                self.measure(name, merged, advised=one == advised)
        for name, adapter in zip(RECIPES, adapters, strict=True):
            if name not in done:
                self.measure(name, adapter)
        if "base" not in done:
            self.measure("base", None)
        if "chosen by data" not in done:
            best, tried = self.chosen(adapters)
            one = Contender(best.method, best.density, None, best.space, rank=RANK)
            merged = one.merge(adapters, [*RECIPES], self.model, weights=best.weights)
            self.measure("chosen by data", merged, chosen=best.name, tried=tried)


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--task", "tasks", nargs=2, multiple=True, help="Name and data folder.")
@click.option("--correct-bias", "corrects", is_flag=True, help="Adam with correction.")
@click.option("--test", default=48, show_default=True, help="Test rows of a task.")
def main(
    work: Path, tasks: tuple[tuple[str, str], ...], corrects: bool, test: int
) -> None:
    if lacking := RECIPES.keys() - dict(tasks).keys():
        raise click.UsageError(f"give the data of {', '.join(sorted(lacking))}.")
    click.echo(f"BLAS: {bench.BLAS.state}", err=True)
    work.mkdir(parents=True, exist_ok=True)
    Three(work, dict(tasks), corrects, test).run()


if __name__ == "__main__":
    main()
