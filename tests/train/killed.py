"""Trainings in processes of their own: killed, resumed and compared."""

import json
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

from mlx_dora.train.run.checkpoint import newest_checkpoint
from tests.processes import Process
from tests.train.saved import log, same_bits, tensors

# Times and memory differ between any two runs.
TIMES = {
    "seconds", "val_seconds", "tokens_per_second", "steps_per_second",
    "peak_memory_bytes", "batch_shapes",
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """A module that trains in FOLDER with the settings of a JSON object.

    It prints a line for each batch.
    """

    module: str

    def words(self, folder: Path, **settings: Any) -> list[str]:
        """The arguments of ``python``."""
        return ["-m", self.module, str(folder), json.dumps(settings)]

    def start(self, folder: Path, **settings: Any) -> Process:
        """Start a training."""
        return Process(self.words(folder, **settings))

    def finish(self, folder: Path, **settings: Any) -> str:
        """Run a training to its end; return what it wrote to its standard error."""
        process = self.start(folder, **settings)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return errors

    def kill_at_step(
        self, folder: Path, step: int, wait: float, **settings: Any
    ) -> None:
        """Start or resume a training; kill it `wait` seconds after a batch."""
        process = self.start(folder, resume=True, **settings)
        assert process.stdout is not None
        for _ in range(step):
            if not process.stdout.readline():
                break
        try:
            process.wait(wait)
        except TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()

    def kill_at_random(
        self, folder: Path, steps: Sequence[int], wait: float, chance: random.Random
    ) -> None:
        """Kill it after each of these batches, by `wait` seconds at most; finish it."""
        for step in steps:
            self.kill_at_step(folder, step, chance.uniform(0, wait))
        self.finish(folder, resume=True)


PLAIN = Program("tests.train.resumable")
GRPO = Program("tests.train.grpo.resumable")


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without `TIMES`."""
    kept = [name for name in log(folder)[0] if name not in TIMES]
    assert kept
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in log(folder)
    ]


def assert_same_run(first: Path, second: Path) -> None:
    """Compare weights, optimizer, steps and logs of two trainings, bit for bit."""
    assert same_bits(tensors(first), tensors(second))
    assert same_bits(tensors(first / "best"), tensors(second / "best"))
    assert lines(first) == lines(second)
    states = [newest_checkpoint(path, multiple_of=2) for path in (first, second)]
    assert states[0] is not None
    assert states[1] is not None
    assert states[0].state.step == states[1].state.step
    assert same_bits(states[0].optimizer, states[1].optimizer)
