from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.train import TrainConfig
from mlx_dora.train.optimizers import (
    build_optimizer,
    build_schedule,
    describe_training,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adam", optim.Adam),
        ("adamw", optim.AdamW),
        ("muon", optim.Muon),
        ("sgd", optim.SGD),
        ("adafactor", optim.Adafactor),
    ],
)
def test_each_optimizer_is_mlx_s(name: Any, kind: type) -> None:
    optimizer = build_optimizer(TrainConfig(optimizer=name, learning_rate=0.5))
    assert type(optimizer) is kind
    assert float(optimizer.learning_rate) == 0.5


def test_settings_of_the_chosen_optimizer_are_used() -> None:
    settings = {"adamw": {"weight_decay": 0.3, "betas": [0.8, 0.9]}, "sgd": {}}
    config = TrainConfig(optimizer="adamw", optimizer_config=settings)
    optimizer = build_optimizer(config)
    assert isinstance(optimizer, optim.AdamW)
    assert optimizer.weight_decay == 0.3
    assert describe_training(config)["optimizer_config"] == {
        "betas": [0.8, 0.9],
        "eps": 1e-8,
        "weight_decay": 0.3,
        "bias_correction": False,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "cosine_decay", "arguments": [1e-3, 50, 1e-5], "warmup": 10},
        {"name": "linear_schedule", "arguments": [1e-3, 1e-4, 20]},
        {
            "name": "step_decay",
            "arguments": [1e-2, 0.5, 7],
            "warmup": 3,
            "warmup_init": 1e-6,
        },
        {"name": "exponential_decay", "arguments": [0.1, 0.9], "warmup": 0},
    ],
)
def test_schedules_are_mlx_lm_s(settings: dict[str, Any]) -> None:
    from mlx_lm.tuner.utils import build_schedule as theirs

    ours, expected = build_schedule(settings), theirs(settings)
    for step in range(0, 60, 3):
        assert float(ours(mx.array(step))) == float(expected(mx.array(step)))


def test_the_schedule_beats_the_learning_rate() -> None:
    schedule = {"name": "linear_schedule", "arguments": [0.25, 0.1, 20]}
    config = TrainConfig(lr_schedule=schedule, learning_rate=9.0)
    assert float(build_optimizer(config).learning_rate) == 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosine"}, "name must be cosine_decay"),
        ({"name": "cosine_decay"}, "arguments must be a list of numbers, got None"),
        (
            {"name": "cosine_decay", "arguments": [1]},
            r"cosine_decay\(init.* does not take \[1\]",
        ),
        ({"name": {"": []}, "arguments": [1]}, "name must be cosine_decay"),
        ({"name": "cosine_decay", "arguments": [1, 2**64]}, "a list of numbers"),
        ({"name": "cosine_decay", "arguments": [float("nan"), 2]}, "a list of numbers"),
        ({"name": "cosine_decay", "arguments": [1, 0]}, "does not take|not finite"),
        ({"name": "step_decay", "arguments": [1e300, 1e300, 1]}, "not finite"),
        ({"name": "cosine_decay", "arguments": [1, 2], "warmpu": 3}, "unknown warmpu"),
        (
            {"name": "cosine_decay", "arguments": [1, 2], "warmup": -1},
            "warmup must be a number of updates",
        ),
    ],
)
def test_bad_schedules_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DoRAError, match=message):
        build_schedule(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adam": {"momentum": 1}}, "unknown momentum; known are betas"),
        ({"adamx": {}}, "no optimizer adamx"),
        ({"adam": 5}, r"optimizer_config\.adam must be a mapping"),
        ({"adam": {"betas": "ab"}}, r"adam\.betas must be like \[0\.9, 0\.999\]"),
        ({"adam": {"betas": [0.9]}}, r"adam\.betas must be like"),
        ({"adam": {"eps": "~"}}, r"adam\.eps must be like"),
        ({"adam": {"eps": float("nan")}}, r"adam\.eps must be like"),
        ({"adam": {"bias_correction": 1}}, r"adam\.bias_correction must be like"),
    ],
)
def test_bad_settings_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DoRAError, match=message):
        build_optimizer(TrainConfig(optimizer_config=settings))
