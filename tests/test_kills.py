"""SIGKILL at random moments: each output stays old, becomes new, or is absent.

A reader looks at the output all the while. The moments are seeded; to see one shot
again, call ``Range(...).shoot(seed)`` with the seed that the failure names.
"""

import hashlib
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dora.adapters.files import load_adapter
from mlx_dora.errors import DoRAError
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.peft import from_peft
from tests.cli.material import make_material
from tests.processes import Process

LINES = {
    "train": "train --model @m0 --data @data --iters 6 --save-every 2 --rank 2 "
    "--num-layers 1 --batch-size 2 --val-batches 0 --adapter-path OUT",
    "fuse": "fuse --model @m0 --adapter-path @a1 --save-path OUT",
    "merge models": "merge models @m0 @m1 --save-path OUT",
    "merge adapters": "merge adapters @a1 @a2 --model @m0 --save-path OUT",
    "extract": "extract @m0 @m1 --rank 2 --save-path OUT",
    "convert": "convert @a1 OUT --to peft",
}
# What stands in the output's place before, made of other inputs.
OLD = {
    "train": LINES["train"] + " --scale 3 --seed 1",
    "fuse": LINES["fuse"].replace("@a1", "@a2"),
    "merge models": "merge models @m1 @m0 --method linear --weights 0.9,0.1 "
    "--save-path OUT",
    "merge adapters": LINES["merge adapters"] + " --method linear",
    "extract": LINES["extract"].replace("rank 2", "rank 1"),
    "convert": LINES["convert"].replace("@a1", "@a2"),
}


def read_adapter_state(folder: Path) -> str:
    adapter = load_adapter(folder)
    return digest(adapter.tensors, adapter.config.scale)


def read_peft_state(folder: Path) -> str:
    return digest(from_peft(folder).tensors, 0)


def read_model_state(folder: Path) -> str:
    if not (folder / "config.json").exists():
        raise DoRAError("no model yet")
    found = Checkpoint(folder)
    return digest({name: found.tensor(name) for name in found.names}, 0)


def digest(tensors: dict[str, mx.array], scale: float) -> str:
    total = hashlib.sha256(str(scale).encode())
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(bytes(memoryview(tensors[name].astype(mx.float32))))  # pyright: ignore[reportArgumentType] - it has the buffer protocol
    return total.hexdigest()


READERS: dict[str, Callable[[Path], str]] = {
    "fuse": read_model_state,
    "merge models": read_model_state,
    "convert": read_peft_state,
}


class Range:
    """A command, its output before and after, and a folder to shoot in."""

    def __init__(self, name: str, material: Path, place: Path) -> None:
        self.name = name
        self.material = material
        self.place = place
        self.out = place / "out"
        self._read = READERS.get(name, read_adapter_state)
        self.complete(OLD[name])
        self.old = self.read()
        self.keeper = place.with_name(f"{place.name}-old")
        shutil.copytree(self.out, self.keeper)
        shutil.rmtree(self.out)
        self.complete(LINES[name])  # warms the disk
        shutil.rmtree(self.out)
        started = time.monotonic()
        self.complete(LINES[name])
        self.seconds = time.monotonic() - started
        self.new = self.read()
        assert self.old != self.new

    def read(self) -> str | None:
        """The state of the output, or None where it is refused as one should be."""
        try:
            return self._read(self.out)
        except (DoRAError, FileNotFoundError):
            return None

    def start(self, line: str, *more: str) -> Process:
        line = line.replace("@", f"{self.material}/").replace("OUT", str(self.out))
        return Process(["-m", "mlx_dora", *line.split(), *more])

    def complete(self, line: str, *more: str) -> None:
        process = self.start(line, *more)
        output = process.communicate(120)
        assert process.returncode == 0, output

    def shoot(self, seed: int) -> bool:
        """Kill the command once; returns whether it was still running."""
        dice = random.Random(f"{self.name} {seed}")
        shutil.rmtree(self.place)
        self.place.mkdir()
        has_old = dice.random() < 0.5
        if has_old:
            shutil.copytree(self.keeper, self.out)
        allowed = {self.old if has_old else None, self.new, None}
        process = self.start(LINES[self.name], *["--overwrite"] * has_old)
        end = time.monotonic() + dice.uniform(0, 1.1 * self.seconds)
        while time.monotonic() < end and process.poll() is None:
            self.look(allowed, seed)
        process.kill()
        process.communicate()
        self.look(allowed, seed)
        if has_old and self.name != "train":
            beside = self.out if self.out.exists() else self._moved_away()
            assert beside is not None, f"seed {seed}: the old output is gone"
        self._rerun(seed)
        return process.returncode == -signal.SIGKILL

    def look(self, allowed: set[str | None], seed: int) -> None:
        state = self.read()
        if self.name == "train" and state is not None and state != self.old:
            return  # of a save on the way
        assert state in allowed, f"seed {seed}"

    def _moved_away(self) -> Path | None:
        return next(self.place.glob(".out.*/old"), None)

    def _rerun(self, seed: int) -> None:
        is_resumed = self.name == "train" and self._is_of_new_run()
        self.complete(LINES[self.name], "--resume" if is_resumed else "--overwrite")
        assert self.read() == self.new, f"seed {seed}: the rerun differs"
        assert [path.name for path in self.place.iterdir()] == ["out"], f"seed {seed}"

    def _is_of_new_run(self) -> bool:
        """Whether a training has checkpoints, and of the killed run alone."""
        states = self.out.glob("checkpoints/*/state.json")
        settings = [json.loads(one.read_text())["settings"] for one in states]
        return bool(settings) and all(one["adapter.scale"] != 3 for one in settings)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("kills") / "m", fisher=False)


def shoot(name: str, shots: int, material: Path, tmp_path: Path) -> None:
    """Kill a command until `shots` of the kills landed while it was running."""
    (tmp_path / "place").mkdir()
    command = Range(name, material, tmp_path / "place")
    landed = 0
    for seed in range(5 * shots):
        if landed == shots:
            return
        if command.shoot(seed):
            landed += 1
        else:
            command.seconds *= 0.9  # the machine is faster now than when it was timed
    assert landed == shots, f"{landed} of {shots} kills landed"


@pytest.mark.parametrize("name", list(LINES))
def test_two_kills_leave_old_new_or_nothing(
    name: str, material: Path, tmp_path: Path
) -> None:
    shoot(name, 2, material, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LINES))
def test_kills_leave_old_new_or_nothing(
    name: str, material: Path, tmp_path: Path
) -> None:
    shoot(name, 34, material, tmp_path)
