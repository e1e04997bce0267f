"""Trains tiny models in each process of a ring, with divided weights.

Run ``python -m tests.train.sharded FOLDER JSON`` in every process. The JSON value is a
list of cases, see `Case`. Each case leaves an adapter in ``FOLDER/NAME``; the first
process also writes the gradients of its first batch and what it sent.
"""

import json
import os
import socket
import stat
import struct
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_dora import DoRAConfig
from mlx_dora.adapters.surgery import apply_layers
from mlx_dora.data.schedule import Schedule
from mlx_dora.evaluate.loss import loss_fn
from mlx_dora.train import TrainConfig, finetune
from mlx_dora.train.group import row_group
from mlx_dora.train.sharded import divide
from mlx_dora.train.stepper import Stepper
from tests.conftest import TINY_CONFIG

_RANDOM = np.random.default_rng(3)
ROWS = [(_RANDOM.integers(3, 300, n).tolist(), 1) for n in (9, 30, 12, 25, 7, 18, 21)]
STEPS = 6  # a ring of processes waits for messages most of the time


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training: its folder's name, the model and the settings.

    With `length`, all rows have this many tokens.
    """

    name: str
    bits: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    dora: dict[str, Any] = field(default_factory=dict)
    shard: str | None = "full"
    writes_gradients: bool = True
    length: int | None = None
    compiles: bool = False

    @property
    def rows(self) -> list[tuple[list[int], int]]:
        """The training data."""
        if self.length is None:
            return ROWS
        return [([3 + i for i in range(self.length)], 1)] * 8

    def build(self) -> nn.Module:
        """The model, the same in every process."""
        mx.random.seed(7)
        model = llama.Model(llama.ModelArgs.from_dict({**TINY_CONFIG, **self.model}))
        if self.bits is not None:
            nn.quantize(model, group_size=32, bits=self.bits)
        mx.eval(model.parameters())
        return model

    @property
    def settings(self) -> TrainConfig:
        """The settings of the training."""
        given: dict[str, Any] = {
            "iters": STEPS,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "steps_per_report": 1,
            "steps_per_eval": STEPS // 2,
            "save_every": STEPS,
            "max_seq_length": 64,
            "shard": self.shard,
        }
        return TrainConfig(**{**given, **self.train})

    @property
    def adapter(self) -> DoRAConfig:
        """The settings of the adapter."""
        return DoRAConfig(**{"rank": 4, "scale": 2.0, "num_layers": -1, **self.dora})


def gradients(case: Case, group: mx.distributed.Group) -> dict[str, mx.array]:
    """Mean gradients of a batch, at a random B."""
    model, train = case.build(), case.settings
    if train.shard and group.size() > 1:
        divide(model, group, train.shard)
    mx.random.seed(1)  # dividing a model may draw numbers
    apply_layers(model, case.adapter, train.fine_tune_type)
    flat = tree_flatten(model.trainable_parameters())
    model.load_weights(
        [(n, v + 0.02 * mx.random.normal(v.shape)) for n, v in flat],  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue] - arrays
        strict=False,
    )
    optimizer = Stepper.make_optimizer(train)
    optimizer.init(model.trainable_parameters())
    stepper = Stepper(model, optimizer, loss=loss_fn, group=group, settings=train)
    rows = row_group(group, train.shard)
    schedule = Schedule(ROWS, 4, 64, seed=0)
    batch = next(schedule.batches(0, rows.rank(), rows.size(), alike=True))
    model.train()
    gradient = stepper.gradient([batch])
    flat = tree_flatten(gradient.total)
    return {name: value / gradient.scale for name, value in flat}  # pyright: ignore[reportOperatorIssue, reportReturnType] - arrays


def sent_bytes() -> int:
    """Bytes that this process has sent over TCP, from the system's own counts."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            number = int(entry.name)
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as channel:
                if channel.type == socket.SOCK_STREAM:
                    info = channel.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("<Q", info, 200)[0]  # tcpi_bytes_sent
        except OSError:  # closed meanwhile
            continue
    return total


def train(case: Case, folder: Path) -> list[int]:
    """Train, and return what was sent until the end of each step."""
    sent: list[int] = []

    def note(phase: str, _total: int, _new: int) -> None:
        if phase == "train":
            sent.append(sent_bytes())
            sys.stdout.write("step\n")
            sys.stdout.flush()

    finetune(
        case.build(),
        None,
        case.rows,
        case.rows[:3],
        train=case.settings,
        dora=case.adapter,
        adapter_path=folder,
        progress=note,
    )
    return sent


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    group = mx.distributed.init()
    for case in (Case(**fields) for fields in cases):
        (mx.enable_compile if case.compiles else mx.disable_compile)()
        sent = train(case, folder / case.name)
        if group.rank() == 0:
            (folder / case.name / "sent.json").write_text(json.dumps(sent))
        if case.writes_gradients:
            values = gradients(case, group)
            mx.eval(values)
            if group.rank() == 0:
                path = folder / case.name / "gradients.safetensors"
                mx.save_safetensors(str(path), values)


def words(folder: Path, *cases: Case) -> list[str]:
    """Arguments of python for a process."""
    listed = json.dumps([asdict(case) for case in cases])
    return ["-m", "tests.train.sharded", str(folder), listed]


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
