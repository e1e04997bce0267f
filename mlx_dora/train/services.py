"""mlx-lm's training callbacks: the user's own, wandb's and swanlab's."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

from mlx_dora.errors import DoRAError
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.run.journal import StepReport


def check_services(config: TrainConfig) -> None:
    """Refuse services whose package is not installed, before anything is trained.

    Raises:
        DoRAError: Naming what to install.
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
    """Pass reports on to the configured services, under the keys mlx-lm uses.

    The services start at the first report.

    Args:
        config: Names the services and the project.
        folder: Where they keep their files; its name becomes the run's name.
        settings: What to record of the training.
    """
    callback: Any = None

    def listen(report: StepReport) -> None:
        nonlocal callback
        if callback is None:
            from mlx_lm.tuner.callbacks import get_reporting_callbacks

            services = ",".join(config.services)
            callback = get_reporting_callbacks(
                services,
                config.project_name,
                str(folder),
                settings,  # pyright: ignore[reportArgumentType] - a dict, says its code
            )
        report_to_host(callback, report)

    return listen


class HostCallback(Protocol):
    """What mlx-lm's ``TrainingCallback`` has."""

    def on_train_loss_report(self, train_info: dict[str, Any], /) -> Any:
        """Take a report of training."""

    def on_val_loss_report(self, val_info: dict[str, Any], /) -> Any:
        """Take a report of a validation."""


def listener_of(
    callback: Callable[[StepReport], None] | HostCallback,
) -> Callable[[StepReport], None]:
    """Make a callback of mlx-lm's kind one that takes our reports; others stay.

    Args:
        callback: A function of a `StepReport`, or an object with mlx-lm's
            ``on_train_loss_report`` and ``on_val_loss_report``
            (``mlx_lm.tuner.callbacks.TrainingCallback``).

    Raises:
        TypeError: If it is neither.
    """
    # Without importing mlx_lm, which takes a second; objects need not inherit from it.
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
    """Pass a report to an mlx-lm callback, under the keys mlx-lm uses.

    A report of a validation has ``iteration``, ``val_loss`` and ``val_time``, the
    seconds that it took.
    """
    told = {
        "iteration": report.step,
        "train_loss": report.train_loss,
        "val_loss": report.val_loss,
        "val_time": report.val_seconds,
        "learning_rate": report.learning_rate,
        "iterations_per_second": report.steps_per_second,
        "tokens_per_second": report.tokens_per_second,
        "trained_tokens": report.trained_tokens,
        "peak_memory": report.peak_memory_bytes / 1e9,
    }
    told = {name: value for name, value in told.items() if value is not None}
    if report.val_loss is not None:
        callback.on_val_loss_report(told)
    else:
        callback.on_train_loss_report(told)
