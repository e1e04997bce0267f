"""Builds optimizers and learning rate schedules from mlx-lm's settings."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.errors import DoRAError
from mlx_dora.options import names_with
from mlx_dora.train.config import TrainConfig

Schedule = Callable[[mx.array], mx.array]

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine_decay": optim.cosine_decay,
    "exponential_decay": optim.exponential_decay,
    "linear_schedule": optim.linear_schedule,
    "step_decay": optim.step_decay,
}


def optimizer_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of the chosen optimizer, except its learning rate.

    Raises:
        DoRAError: If the settings are not a mapping, or a setting is unknown or bad.
    """
    given = config.optimizer_config or {}
    unknown = [str(name) for name in given if name not in OPTIMIZERS]
    if unknown:
        raise DoRAError(
            f"optimizer_config: no optimizer {', '.join(unknown)}; its keys must be "
            f"among {', '.join(OPTIMIZERS)}."
        )
    settings = given.get(config.optimizer) or {}
    if not isinstance(settings, dict):
        raise DoRAError(
            f"optimizer_config.{config.optimizer} must be a mapping, got {settings!r}."
        )
    known = _defaults(config.optimizer)
    unknown = [str(name) for name in settings if name not in known]
    if unknown:
        raise DoRAError(
            f"optimizer_config.{config.optimizer}: unknown {', '.join(unknown)}; "
            f"known are {', '.join(known)}."
        )
    for name, value in settings.items():
        if not _is_like(value, known[name]):
            raise DoRAError(
                f"optimizer_config.{config.optimizer}.{name} must be like "
                f"{known[name]!r}, got {value!r:.60}."
            )
    return settings


def _is_like(value: object, default: object) -> bool:
    """Whether a setting has the type of the optimizer's default."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if type(default) is int:
        return type(value) is int and _is_number(value)
    if isinstance(default, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(default)
            and all(map(_is_number, value))
        )
    return (default is None and value is None) or _is_number(value)


def build_optimizer(config: TrainConfig) -> optim.Optimizer:
    """Make the configured optimizer.

    MLX's Adam and AdamW apply bias correction only if ``bias_correction`` is set.

    Raises:
        DoRAError: If a setting or the schedule is unknown or invalid.
    """
    settings = optimizer_settings(config)
    rate = build_schedule(config.lr_schedule) if config.lr_schedule else None
    rate = config.learning_rate if rate is None else rate
    try:
        return OPTIMIZERS[config.optimizer](learning_rate=rate, **settings)
    except (ValueError, TypeError) as error:
        raise DoRAError(f"optimizer_config.{config.optimizer}: {error}") from error


def describe_training(config: TrainConfig) -> dict[str, Any]:
    """The settings to record with the adapter, including defaults."""
    return {
        **{name: getattr(config, name) for name in names_with(config, "recorded")},
        "optimizer_config": {
            **_defaults(config.optimizer),
            **optimizer_settings(config),
        },
    }


def _defaults(optimizer: str) -> dict[str, Any]:
    """The default settings of an optimizer, except its learning rate."""
    parameters = inspect.signature(OPTIMIZERS[optimizer]).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "learning_rate"}


def describe_variant(dora: DoRAConfig, train: TrainConfig) -> dict[str, Any]:
    """Variant settings to record with the adapter; empty for plain DoRA."""
    if dora.is_plain:
        return {}
    names = ("variant", "init", "rank", "magnitude_keys")
    return {
        **{name: getattr(dora, name) for name in names},
        **{
            name: getattr(config, name)
            for config in (train, dora)
            for name in names_with(config, "variant", dora.variant)
        },
    }


def build_schedule(settings: dict[str, Any]) -> Schedule:
    """Make a schedule from mlx-lm's ``lr_schedule``; its steps are updates.

    Args:
        settings: ``name`` and ``arguments`` of an MLX schedule. Optionally ``warmup``,
            the number of updates in which the rate rises linearly from ``warmup_init``
            to the first argument.

    Raises:
        DoRAError: If a key is unknown or missing, or the arguments are invalid.
    """
    known = ("name", "arguments", "warmup", "warmup_init")
    unknown = [str(key) for key in settings if key not in known]
    if unknown:
        raise DoRAError(
            f"lr_schedule: unknown {', '.join(unknown)}; known are {', '.join(known)}."
        )
    name, arguments = settings.get("name"), settings.get("arguments")
    if not isinstance(name, str) or name not in SCHEDULES:
        raise DoRAError(
            f"lr_schedule: name must be {', '.join(SCHEDULES)}; got {name!r}."
        )
    if not isinstance(arguments, list | tuple) or not all(map(_is_number, arguments)):
        raise DoRAError(
            f"lr_schedule: arguments must be a list of numbers, got {arguments!r}."
        )
    warmup = settings.get("warmup") or 0
    start = settings.get("warmup_init") or 0.0
    if type(warmup) is not int or warmup < 0 or not _is_number(start):
        raise DoRAError(
            "lr_schedule: warmup must be a number of updates and warmup_init a rate, "
            f"got {warmup!r} and {start!r}."
        )
    try:
        schedule = SCHEDULES[name](*arguments)
        if warmup:
            rising = optim.linear_schedule(start, arguments[0], warmup)
            schedule = optim.join_schedules([rising, schedule], [warmup + 1])
        rates = [float(schedule(mx.array(step))) for step in (0, 1, warmup + 1)]
    # RuntimeError: MLX casts steps to 32 bits.
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        wanted = inspect.signature(SCHEDULES[name])
        raise DoRAError(
            f"lr_schedule: {name}{wanted} does not accept {arguments!r}: {error}"
        ) from error
    if not all(map(math.isfinite, rates)):
        raise DoRAError(
            f"lr_schedule: {name} of {arguments!r} gives a rate that is not finite."
        )
    return schedule


def _is_number(value: object) -> bool:
    """Whether a value is a number that MLX accepts: finite, or an int of 32 bits."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**31
    return isinstance(value, float) and math.isfinite(value)
