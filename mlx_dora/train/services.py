"""Passes reports to mlx-lm's training callbacks: the user's, wandb and swanlab."""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

from mlx_dora.errors import DoRAError
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.run.journal import StepReport


def check_services(config: TrainConfig) -> None:
    """Refuse services whose package is not installed, before training starts.

    Raises:
        DoRAError: Names the packages to install.
    """
    missing = [name for name in config.services if find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise DoRAError(
            f"report_to needs {names}, not installed: pip install {' '.join(missing)}."
        )


def service_listener(
    config: TrainConfig, folder: Path, settings: dict[str, Any]
) -> Callable[[StepReport], None]:
    """Make a listener that passes reports to the configured services.

    The reports have mlx-lm's keys. The services start at the first report.

    Args:
        config: Names the services and the project.
        folder: Folder for the services' files; its name becomes the run's name.
        settings: Settings of the training to record.
    """

    @cache
    def host() -> Any:
        from mlx_lm.tuner.callbacks import get_reporting_callbacks

        services = ",".join(config.services)
        arguments: Any = (services, config.project_name, str(folder), settings)
        return get_reporting_callbacks(*arguments)

    return lambda report: report_to_host(host(), report)


class HostCallback(Protocol):
    """Interface of mlx-lm's ``TrainingCallback``."""

    def on_train_loss_report(self, train_info: dict[str, Any], /) -> Any:
        """Receive a report of training."""

    def on_val_loss_report(self, val_info: dict[str, Any], /) -> Any:
        """Receive a report of a validation."""


def listener_of(
    callback: Callable[[StepReport], None] | HostCallback,
) -> Callable[[StepReport], None]:
    """Adapt an mlx-lm callback to `StepReport`; return a function unchanged.

    Args:
        callback: A function of a `StepReport`, or an object with mlx-lm's
            ``on_train_loss_report`` and ``on_val_loss_report``
            (``mlx_lm.tuner.callbacks.TrainingCallback``).

    Raises:
        TypeError: If `callback` is neither.
    """
    # Checked by methods, because importing mlx_lm takes a second.
    methods = ("on_train_loss_report", "on_val_loss_report")
    if all(callable(getattr(callback, name, None)) for name in methods):
        return partial(report_to_host, callback)
    if not callable(callback):
        raise TypeError(
            "callback must be a function of a StepReport, or have mlx-lm's "
            f"{' and '.join(methods)}; got {type(callback).__name__}"
        )
    return cast(Callable[[StepReport], None], callback)


def report_to_host(callback: Any, report: StepReport) -> None:
    """Pass a report to an mlx-lm callback, with mlx-lm's keys.

    A validation report includes ``iteration``, ``val_loss`` and ``val_time``, its
    duration in seconds.
    """
    info = {
        "iteration": report.step,
        "train_loss": report.train_loss,
        "val_loss": report.val_loss,
        "val_time": report.val_seconds,
        "learning_rate": report.learning_rate,
        "iterations_per_second": report.steps_per_second,
        "tokens_per_second": report.tokens_per_second,
        "trained_tokens": report.trained_tokens,
        "peak_memory": report.peak_memory_bytes / 1e9,
        **(report.metrics or {}),
    }
    info = {name: value for name, value in info.items() if value is not None}
    if report.val_loss is not None:
        callback.on_val_loss_report(info)
    else:
        callback.on_train_loss_report(info)
