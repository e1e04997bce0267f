"""Reports of a training, and the log that stores them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse
from mlx_dora.notebook import Shown
from mlx_dora.train.run.lines import Lines

LOG_NAME = "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A report of the training since the previous report, or of a validation.

    Args:
        step: Number of batches done.
        train_loss: Mean loss of the target tokens since the previous report; None for a
            validation.
        val_loss: Mean loss on the validation data; None for training.
        learning_rate: Learning rate at this step.
        tokens_per_second: Target tokens (without padding and prompts) per second spent
            on steps.
        steps_per_second: Batches per second spent on steps.
        metrics: Means of the objective's metrics since the previous report, or on the
            validation data; None for supervised fine-tuning.
        skipped_steps: Number of steps so far that had no target, or whose loss or
            gradient was not finite; None if zero. They did not change the weights.
        trained_tokens: Number of target tokens so far.
        seconds: Time since the training began.
        peak_memory_bytes: Peak memory of MLX so far.
        batch_shapes: Number of shapes of batches since this run started or resumed.
        step_arrays: Number of arrays in the largest step, an upper bound of the buffers
            it needs; None where the device sets no limit to them.
        live_arrays: Number of arrays of the model and the optimizer, each of which
            holds one of Metal's 499,000 buffers.
        val_seconds: Duration of the validation.
        delta_m: Mean over DoRA layers of ΔM, the change of the rows' lengths; None for
            a validation or without such layers.
        delta_d: Mean over DoRA layers of ΔD, one minus the cosine between a row and its
            base.
        correlation: Correlation of ΔM and ΔD over layers; None if they do not vary.
        gain_min: Minimum over all rows of g = m/‖W0 + sBA‖.
        gain_max: Maximum over all rows of g.
        layers: The same figures for each layer; None except at checkpoints.
        kernels: On a GPU, in the first report of a run: which calls run kernels
            (``taken``) on which ``device``.
    """

    step: int
    train_loss: float | None = None
    val_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    steps_per_second: float | None = None
    metrics: dict[str, float] | None = None
    skipped_steps: int | None = None
    trained_tokens: int
    seconds: float
    peak_memory_bytes: int
    batch_shapes: int | None = None
    step_arrays: int | None = None
    live_arrays: int | None = None
    val_seconds: float | None = None
    delta_m: float | None = None
    delta_d: float | None = None
    correlation: float | None = None
    gain_min: float | None = None
    gain_max: float | None = None
    layers: dict[str, dict[str, float]] | None = None
    kernels: dict[str, Any] | None = None

    def __str__(self) -> str:
        """The step and its losses; ``callback=print`` shows a training with it."""
        parts = {"loss": self.train_loss, "validation loss": self.val_loss}
        shown = (f"{name} {v:.4f}" for name, v in parts.items() if v is not None)
        return f"step {self.step}  {'  '.join(shown)}"

    def __repr__(self) -> str:
        """The fields that are not None, without the layers and kernels."""
        hidden = ("layers", "kernels")
        shown = {k: v for k, v in self.to_dict().items() if k not in hidden}
        inside = ", ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in shown.items()
        )
        return f"StepReport({inside})"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        return {
            name: value for name, value in asdict(self).items() if value is not None
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainReport(Shown):
    """Result of a training.

    Args:
        adapter_path: Folder of the adapter.
        steps: Number of batches trained on, including those before a resume.
        modules: Paths of the trained modules.
        trainable_parameters: Number of trainable parameters.
        train_loss: Training loss of the last report.
        first_val_loss: Validation loss before the first step; None without validation.
        val_loss: Validation loss after the last step; None without validation.
        best_step: Step with the lowest validation loss; None without validation.
        steps_skipped: Number of skipped steps, see `StepReport`.
        trained_tokens: Number of target tokens trained on.
        seconds: Total duration, including validations.
        peak_memory_bytes: Peak memory of MLX.
        rows_truncated: Number of training rows truncated, each counted once.
        rows_skipped: Number of training rows skipped for lack of a target.
        first_step: Step at which this run started: 0, or that of the checkpoint.
        history: All reports.
    """

    adapter_path: Path
    steps: int
    modules: tuple[str, ...]
    trainable_parameters: int
    train_loss: float | None
    first_val_loss: float | None = None
    val_loss: float | None = None
    best_step: int | None = None
    steps_skipped: int = 0
    trained_tokens: int
    seconds: float
    peak_memory_bytes: int
    rows_truncated: int = 0
    rows_skipped: int = 0
    first_step: int = 0
    history: tuple[StepReport, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return steps, losses, parameters and folder."""
        return {
            "steps": self.steps,
            "train_loss": self.train_loss,
            "val_loss": self.val_loss,
            "trainable_parameters": self.trainable_parameters,
            "seconds": self.seconds,
            "adapter_path": str(self.adapter_path),
        }

    def table(self) -> list[dict[str, Any]]:
        """Return the reports, newest first."""
        names = ("step", "train_loss", "val_loss", "delta_m", "delta_d")
        return [
            {name: getattr(report, name) for name in names}
            for report in reversed(self.history)
        ]


def read_log(content: bytes, path: Path) -> list[StepReport]:
    """Read the reports of a log and check every field.

    Args:
        content: Content of the file, or a prefix of complete lines.
        path: Path of the log, for error messages.

    Raises:
        DoRAError: If a line is not a report; names the first such line.
    """
    return [
        _report(parse(line, f"{path}, line {number}"), f"{path}, line {number}")
        for number, line in enumerate(content.split(b"\n"), 1)
        if line.strip()
    ]


_WHOLE = {
    "step",
    "skipped_steps",
    "trained_tokens",
    "peak_memory_bytes",
    "batch_shapes",
    "step_arrays",
    "live_arrays",
}


def _report(row: Any, where: str) -> StepReport:
    if not isinstance(row, dict):
        raise DoRAError(f"{where} must hold a JSON object, got {row!r:.40}.")
    kinds = {kind.name: kind for kind in fields(StepReport)}
    problems = [f"{name!r:.40} is unknown" for name in row if name not in kinds]
    for name, kind in kinds.items():
        value = row.get(name)
        if value is None:
            if kind.default is MISSING:
                problems.append(f"{name} is missing")
        elif name in ("layers", "kernels", "metrics"):
            if not isinstance(value, dict):
                problems.append(f"{name} must be an object, got {value!r:.40}")
        elif name in _WHOLE and (type(value) is not int or value < 0):
            problems.append(f"{name} must be a whole number, got {value!r:.40}")
        elif type(value) not in (int, float):
            problems.append(f"{name} must be a number, got {value!r:.40}")
    if problems:
        raise DoRAError(f"{where} is not a training report: {'; '.join(problems)}.")
    return StepReport(**row)


class Journal:
    """Collects reports, writes them to ``log.jsonl``, and passes them to listeners.

    Args:
        folder: Folder for ``log.jsonl``, or None to write no log. The first report
            makes the folder and replaces the log of an earlier training.
        listeners: Called with each report, in this order.
    """

    def __init__(
        self, folder: Path | None, listeners: Sequence[Callable[[StepReport], None]]
    ) -> None:
        self.history: list[StepReport] = []
        self._kernels: dict[str, Any] | None = None
        self._lines = Lines(None if folder is None else folder / LOG_NAME)
        self._listeners = listeners

    def note(self, kernels: dict[str, Any]) -> None:
        """Add to the next report what the ops of the run use."""
        self._kernels = kernels

    def add(self, report: StepReport) -> None:
        """Record a report."""
        if self._kernels is not None:
            report, self._kernels = replace(report, kernels=self._kernels), None
        self._lines.append([report.to_dict()])
        self.history.append(report)
        for listener in self._listeners:
            listener(report)

    def position(self) -> int:
        """Flush the log to disk and return its length in bytes."""
        return self._lines.position()

    def restore(self, folder: Path, position: int) -> None:
        """Continue the log after its first `position` bytes; discard the rest.

        Args:
            folder: Folder of the log.
            position: Value of `position` in the run to be resumed.

        Raises:
            DoRAError: If the log is shorter than `position`, or malformed.
        """
        path = folder / LOG_NAME
        self.history = read_log(self._lines.restore(path, position), path)

    def has(self, name: str, step: int) -> bool:
        """Whether a field was reported at this step."""
        return any(
            getattr(report, name) is not None
            for report in self.history
            if report.step == step
        )

    def first(self, name: str) -> float | None:
        """The first reported value of a field, or None."""
        return next(self._values(name), None)

    def last(self, name: str) -> float | None:
        """The latest reported value of a field, or None."""
        values = list(self._values(name))
        return values[-1] if values else None

    def _values(self, name: str) -> Iterator[float]:
        values = (getattr(report, name) for report in self.history)
        return (value for value in values if value is not None)
