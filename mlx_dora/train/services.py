"""wandb and swanlab, through mlx-lm's own callbacks."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
        told = {
            "iteration": report.step,
            "train_loss": report.train_loss,
            "val_loss": report.val_loss,
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

    return listen
