"""What a training tells: after some steps, and at its end."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse

LOG_NAME = "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One report: of the training since the last one, or of a validation.

    Args:
        step: Batches done.
        train_loss: Mean loss of the target tokens since the last report; None in the
            report of a validation.
        val_loss: Mean loss on the validation data; None in a report of training.
        learning_rate: At this step.
        tokens_per_second: Target tokens, padding and prompts apart, over the time
            spent on steps.
        steps_per_second: Batches over the same time.
        skipped_steps: Steps so far whose loss or gradient was not finite, or that had
            no target; None if there were none. They changed nothing.
        trained_tokens: Target tokens so far.
        seconds: Since the training began.
        peak_memory_bytes: Most memory MLX held so far.
        val_seconds: How long a validation took.
        delta_m: Mean over DoRA layers of ΔM, how far the rows' lengths have moved; None
            without such layers, and in the report of a validation.
        delta_d: Mean over layers of ΔD, one minus the cosine of the rows' turn.
        correlation: Of ΔM and ΔD over layers; None if they do not vary.
        gain_min: Least g = m/‖W0 + sBA‖ of any row.
        gain_max: Greatest.
        layers: At checkpoints the same by layer.
    """

    step: int
    train_loss: float | None = None
    val_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    steps_per_second: float | None = None
    skipped_steps: int | None = None
    trained_tokens: int
    seconds: float
    peak_memory_bytes: int
    val_seconds: float | None = None
    delta_m: float | None = None
    delta_d: float | None = None
    correlation: float | None = None
    gain_min: float | None = None
    gain_max: float | None = None
    layers: dict[str, dict[str, float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that have a value."""
        return {
            name: value for name, value in asdict(self).items() if value is not None
        }


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The result of a training.

    Args:
        adapter_path: Folder of the adapter.
        steps: Batches trained on.
        modules: Paths of what was trained.
        trainable_parameters: How many numbers those have.
        train_loss: Of the last report.
        first_val_loss: Before the first step; None without validation.
        val_loss: After the last step.
        best_step: Where the validation loss was least; None without validation.
        steps_skipped: Steps that changed nothing, see `StepReport`.
        trained_tokens: Target tokens.
        seconds: Whole duration, validations included.
        peak_memory_bytes: Most memory MLX held.
        rows_truncated: Training rows that were cut (each counted once).
        rows_skipped: Training rows without a target token, left out.
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
    history: tuple[StepReport, ...] = ()


def read_log(content: bytes, path: Path) -> list[StepReport]:
    """The reports in a log, each field checked.

    Args:
        content: Of the file, or a part of it that ends with a line.
        path: What an error names.

    Raises:
        DoRAError: Naming the first line that is no report.
    """
    return [
        _report(parse(line, f"{path}, line {number}"), f"{path}, line {number}")
        for number, line in enumerate(content.split(b"\n"), 1)
        if line.strip()
    ]


_WHOLE = {"step", "skipped_steps", "trained_tokens", "peak_memory_bytes"}


def _report(row: Any, where: str) -> StepReport:
    if not isinstance(row, dict):
        raise DoRAError(f"{where} must hold a JSON object, got {row!r:.40}.")
    kinds = {field.name: field for field in fields(StepReport)}
    problems = [f"{name!r:.40} is unknown" for name in row if name not in kinds]
    for name, field in kinds.items():
        value = row.get(name)
        if value is None:
            if field.default is MISSING:
                problems.append(f"{name} is missing")
        elif name == "layers":
            if not isinstance(value, dict):
                problems.append(f"layers must be an object, got {value!r:.40}")
        elif name in _WHOLE and (type(value) is not int or value < 0):
            problems.append(f"{name} must be a whole number, got {value!r:.40}")
        elif type(value) not in (int, float):
            problems.append(f"{name} must be a number, got {value!r:.40}")
    if problems:
        raise DoRAError(f"{where} is no report of a training: {'; '.join(problems)}.")
    return StepReport(**row)


class Journal:
    """Takes reports: keeps them, writes ``log.jsonl``, and passes them on.

    Args:
        folder: Where ``log.jsonl`` goes; folder and file are made at the first report,
            and a log of an earlier training is replaced then. None writes nothing.
        listeners: Called with each report, in this order.
    """

    def __init__(
        self, folder: Path | None, listeners: Sequence[Callable[[StepReport], None]]
    ) -> None:
        self.history: list[StepReport] = []
        self._path = None if folder is None else folder / LOG_NAME
        self._listeners = listeners

    def add(self, report: StepReport) -> None:
        """Take one report."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            mode = "a" if self.history else "w"
            with self._path.open(mode, encoding="utf-8") as file:
                file.write(json.dumps(report.to_dict()) + "\n")
        self.history.append(report)
        for listener in self._listeners:
            listener(report)

    def position(self) -> int:
        """Length of the log in bytes; all of it is on the disk afterwards."""
        if self._path is None or not self.history:
            return 0
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def restore(self, folder: Path, position: int) -> None:
        """Go on after the log's first `position` bytes; the rest is cut off.

        Args:
            folder: Of the log.
            position: From `position` of the run that is continued.

        Raises:
            DoRAError: If the log is shorter, or holds something else.
        """
        path = folder / LOG_NAME
        content = path.read_bytes()[:position] if path.exists() else b""
        if len(content) < position:
            raise DoRAError(
                f"{path} has {len(content)} bytes, the checkpoint was written after "
                f"{position}: put the log back, or train anew with --overwrite."
            )
        self.history = read_log(content, path)
        if self._path is not None and position:
            os.truncate(path, position)

    def has(self, name: str, step: int) -> bool:
        """Whether a field was reported at this very step."""
        return any(
            getattr(report, name) is not None
            for report in self.history
            if report.step == step
        )

    def first(self, name: str) -> float | None:
        """The first value of a field of the reports; None if there is none."""
        return next(self._values(name), None)

    def last(self, name: str) -> float | None:
        """The latest value of a field of the reports; None if there is none."""
        values = list(self._values(name))
        return values[-1] if values else None

    def _values(self, name: str) -> Iterator[float]:
        values = (getattr(report, name) for report in self.history)
        return (value for value in values if value is not None)
