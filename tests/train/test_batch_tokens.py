"""Training in batches of one width, filled up to a number of tokens."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.data.schedule import Schedule
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import evaluate_loss
from mlx_dora.train import TrainConfig
from mlx_dora.train.stepper import Gradient
from tests.checks import assert_close, to_numpy
from tests.train import ring
from tests.train.conftest import EXAMPLES, plain_stepper
from tests.train.killed import PLAIN, assert_same_run
from tests.train.saved import log, tensors

Run = Callable[..., Any]


def epoch_gradient(model: nn.Module, **options: Any) -> Gradient:
    settings = TrainConfig(**{"batch_size": 3, "max_seq_length": 64, **options})
    schedule = Schedule(
        EXAMPLES, settings.batch_size, 64, batch_tokens=settings.batch_tokens
    )
    batches = list(islice(schedule.batches(), schedule.length(1)))
    return plain_stepper(model, settings).gradient(batches)


def test_an_epoch_has_the_gradient_that_it_has_in_other_batches(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model = make_tiny_model()
    apply_dora(model, DoRAConfig(rank=4, scale=2.0, num_layers=-1))
    for layer in model.modules():
        if "lora_b" in layer:
            layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(3))
    model.train()
    fixed = epoch_gradient(model)
    filled = epoch_gradient(model, batch_tokens=60)
    targets = sum(len(tokens) - first for tokens, first in EXAMPLES)
    assert filled.tokens == fixed.tokens == targets
    assert filled.loss == pytest.approx(fixed.loss, rel=1e-5)
    assert filled.norm == pytest.approx(fixed.norm, rel=1e-4)


def test_validation_is_that_of_other_batches(tiny_model: nn.Module) -> None:
    rows = []
    fixed, filled = (
        evaluate_loss(
            tiny_model,
            EXAMPLES,
            batch_size=2,
            num_batches=4,
            batch_tokens=tokens,
            progress=rows.append,
        )
        for tokens in (None, 40)
    )
    assert filled.tokens == fixed.tokens
    assert filled.loss == pytest.approx(fixed.loss, rel=1e-6)
    assert sum(rows) == 16
    assert len(rows) > 8  # smaller batches than four of two rows


def test_training_reports_its_batches(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        _, report = run(batch_tokens=70, epochs=2, valid=EXAMPLES[:5])
    assert report.trained_tokens == 2 * sum(len(t) - at for t, at in EXAMPLES)
    schedule = Schedule(EXAMPLES, 4, 2048, batch_tokens=70)
    assert report.steps == schedule.length(2)
    usage = schedule.usage()
    assert f"of {len(usage.shapes)} shapes, {usage.padding:.1%} padding" in caplog.text


def test_what_does_not_go_together_is_refused(run: Run) -> None:
    with pytest.raises(DoRAError, match="packing and batch_tokens"):
        TrainConfig(packing=True, batch_tokens=64)
    options = {"batches": lambda *_, **__: iter(())}
    with pytest.raises(DoRAError, match="does not apply to custom batches"):
        run(batch_tokens=64, options=options)


def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"batch_tokens": 60}
    PLAIN.finish(whole, **settings)
    PLAIN.kill_at_step(killed, 5, 0.02, **settings)
    PLAIN.finish(killed, resume=True, **settings)
    assert_same_run(whole, killed)


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    # Two processes divide the rows into other batches, so each update takes an epoch.
    counts = [
        Schedule(EXAMPLES, 4, 2048, batch_tokens=64, ranks=ranks).length(1)
        for ranks in (1, 2)
    ]
    each = [
        {
            **{"batch_tokens": 64, "epochs": 2, "dropout": 0.0},
            **{"grad_accumulation_steps": count, "save_every": count},
            **{"steps_per_report": count, "steps_per_eval": count},
        }
        for count in counts
    ]
    PLAIN.finish(alone, **each[0])
    command = PLAIN.words(shared, **each[1])
    for code, errors in ring.both(tmp_path, command, command):
        assert code == 0, errors
    for name, value in tensors(shared).items():
        assert_close(value, to_numpy(tensors(alone)[name]), bound=2e-4)
    lines = [
        [
            (line["trained_tokens"], line["train_loss"])
            for line in log(folder)
            if "train_loss" in line
        ]
        for folder in (alone, shared)
    ]
    assert len(lines[0]) == len(lines[1]) == 2
    for (tokens, loss), (expected, wanted) in zip(*lines, strict=True):
        assert tokens == expected
        assert loss == pytest.approx(wanted, rel=1e-4)
