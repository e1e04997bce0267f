"""Run the grid of study 1 of ``docs/studies/when.md``, as far as it is not done.

    python benchmarks/when/run.py --work FOLDER
    python benchmarks/when/run.py --work FOLDER --part 0/2 & ... --part 1/2
    python benchmarks/when/run.py --work FOLDER --repeat 10

Each run is a line of ``benchmarks/results/when.jsonl``, written when it ends. An
interrupted study continues where it stopped. Runs use one thread. Data, the 4-bit base
and the activations of frozen blocks are kept in the work folder. ``--part`` divides the
cells among processes, which may append to the same file. ``--repeat`` draws runs from
the results, repeats them, and fails if a bit differs.
"""

import os
import sys
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import _harness as bench  # isort: skip - OpenBLAS before mlx

import fcntl
import json
import logging
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click
import mlx.core as mx
from _machine import describe_machine
from grid import Cell, Job, jobs
from tasks import write_task
from train import Bench

from mlx_dora.demo.model import demo_model

RESULTS = Path(__file__).parents[1] / "results" / "when.jsonl"


class Study:
    """Results so far, and the opened task.

    Args:
        work: Folder of data and bases.
        path: File of the results.
    """

    def __init__(self, work: Path, path: Path) -> None:
        self.work, self.path = work, path
        self.results: dict[Job, dict[str, Any]] = {}
        self._tasks: set[str] = set()
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            if "cell" in entry:
                cell = Cell(**entry["cell"])
                self.results[Job(cell, entry["place"], entry["seed"])] = entry
            else:
                self._tasks.add(entry["task"])
        self._opened: tuple[tuple[str, str], Bench, str] | None = None
        self._machine = describe_machine()  # now: this is the code that runs

    def run(self, job: Job) -> dict[str, Any]:
        """Run a job; its line is not written."""
        bench_, data = self._bench(job.cell)
        start = time.process_time()
        result = bench_.run(job, with_geometry=_has_geometry(job))
        seconds = round(time.process_time() - start, 1)
        return {
            "cell": asdict(job.cell),
            "place": job.place,
            "rate": job.cell.rate(job.place),
            "seed": job.seed,
            "data": data,
            "untrained_loss": round(bench_.untrained, 6),
            **result,
            "cpu_seconds": seconds,
            "nice": os.nice(0),
            "blas": bench.BLAS.state,
            **self._machine,
        }

    def add(self, job: Job) -> None:
        """Run a job and write its line at once."""
        line = self.run(job)
        self._describe_task(job.cell.task)
        append_line(self.path, line)
        self.results[job] = line
        cell = job.cell
        click.echo(
            f"{cell.task} {cell.base} {cell.method} {cell.rank} equal {cell.equal_to} "
            f"steps {cell.steps} rate {line['rate']:.3g} seed {job.seed}: valid "
            f"{line['valid_loss']}, {line['cpu_seconds']} s",
            err=True,
        )

    def _describe_task(self, task: str) -> None:
        """Write what all runs of a task share, once (or once for each process)."""
        if task not in self._tasks and self._opened is not None:
            _, bench_, data = self._opened
            shared = {"task": task, "data": data, "row_targets": bench_.test_targets}
            append_line(self.path, shared)
            self._tasks.add(task)

    def _bench(self, cell: Cell) -> tuple[Bench, str]:
        key = cell.task, cell.base
        if self._opened is None or self._opened[0] != key:
            with _alone(self.work):
                folder = self.work / cell.task
                data = write_task(cell.task, folder)
                self._opened = key, Bench(folder, _base(self.work, cell.base)), data
        return self._opened[1:]


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line of JSON by a single write, so that processes never mix lines."""
    text = (json.dumps(line, separators=(",", ":")) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        if file.write(text) < len(text):
            raise OSError(f"{path}: the last line is not complete: is the disk full?")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _base(work: Path, name: str) -> Path:
    """Return the folder of a base; packs the 4-bit one on first use."""
    model = Path(demo_model())
    if name == "dense":
        return model
    folder = work / "base-4bit"
    if not folder.exists():
        from mlx_lm.convert import convert

        convert(str(model), str(folder), quantize=True, q_bits=4, q_group_size=64)
    return folder


def _has_geometry(job: Job) -> bool:
    """Whether five seeds run at the job's rate, so that study 3 reads the run."""
    return job.seed >= 3


def _repeat(study: Study, count: int) -> None:
    """Repeat runs drawn at random, and compare the bits of their losses."""
    done = [job for job, line in study.results.items() if line["valid_loss"]]
    for job in random.Random(0).sample(sorted(done, key=repr), count):
        line, before = study.run(job), study.results[job]
        is_same = line["digest"] == before["digest"]
        click.echo(f"{job}: {'the same bits' if is_same else 'DIFFERENT'}")
        if not is_same:
            raise SystemExit(1)


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--part", default="0/1", show_default=True)
@click.option("--minutes", type=float, help="Stop after the run at this time.")
@click.option("--repeat", type=int, help="Repeat this many runs instead.")
@click.option("--most", type=int, help="Stop after this many runs.")
def main(
    work: Path,
    results: Path,
    part: str,
    minutes: float | None,
    repeat: int | None,
    most: int | None,
) -> None:
    mx.disable_compile()  # compiling takes as long as a run
    logging.disable(logging.WARNING)
    study, start = Study(work, results), time.monotonic()
    if repeat:
        _repeat(study, repeat)
        return
    for number, job in enumerate(jobs(study.results, part)):
        late = minutes is not None and time.monotonic() - start > 60 * minutes
        if late or number == most:
            break
        study.add(job)


if __name__ == "__main__":
    main()
