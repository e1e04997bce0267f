from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora import DoRAConfig
from mlx_dora.data.dataset import RowDataset
from mlx_dora.data.targets import Example
from mlx_dora.evaluate.loss import loss_fn
from mlx_dora.train import TrainConfig, TrainReport, finetune
from mlx_dora.train.optimizers import build_optimizer
from mlx_dora.train.stepper import Stepper

EXAMPLES: list[tuple[list[int], int]] = [
    ([1, *range(10 + i, 10 + i + 6 + 5 * (i % 4)), 2], 1 + i % 3) for i in range(12)
]


class ExampleSet(RowDataset):
    """`EXAMPLES` for any objective: pairs of neighbors, labels in turn."""

    def __len__(self) -> int:
        return len(EXAMPLES)

    def __getitem__(self, index: int, /) -> Example:
        return EXAMPLES[index]

    def where(self, index: int, /) -> str:
        return f"example {index}"

    def label(self, index: int) -> bool:
        return index % 3 == 0


def plain_stepper(model: nn.Module, settings: TrainConfig) -> Stepper:
    """Return the stepper of plain training, with a new optimizer."""
    optimizer = build_optimizer(settings)
    optimizer.init(model.trainable_parameters())
    return Stepper(
        model,
        optimizer,
        loss=loss_fn,
        group=mx.distributed.init(),
        settings=settings,
    )


@pytest.fixture
def run(
    make_tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> Callable[..., tuple[nn.Module, TrainReport]]:
    """Train a tiny model: ``run("name", iters=3, rank=4, ...)``."""

    def call(
        name: str = "adapter",
        *,
        model: nn.Module | None = None,
        data: Any = EXAMPLES,
        valid: Any = None,
        callback: Any = None,
        progress: Any = None,
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[nn.Module, TrainReport]:
        ours = {field.name for field in fields(DoRAConfig)}
        dora = {key: settings.pop(key) for key in ours & set(settings)}
        defaults = {"iters": 5, "learning_rate": 1e-2, "batch_size": 4}
        model = make_tiny_model() if model is None else model
        report = finetune(
            model,
            None,
            data,
            valid,
            train=TrainConfig(**{**defaults, **settings}),
            dora=DoRAConfig(**{"rank": 4, "scale": 2.0, "num_layers": -1, **dora}),
            adapter_path=tmp_path / name,
            callback=callback,
            progress=progress,
            **(options or {}),
        )
        return model, report

    return call
