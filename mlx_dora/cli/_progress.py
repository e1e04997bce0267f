"""Shows progress on stderr: live bars on a terminal, lines or nothing elsewhere."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mlx_dora.cli._echo import note
from mlx_dora.cli._log import is_quiet
from mlx_dora.errors import printable
from mlx_dora.train.run.journal import StepReport

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def duration(seconds: float) -> str:
    """Format seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int) -> str:
    """Format a number of bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


LINE = 80
"""Columns of a report, which must fit a terminal of the usual width."""


_METRICS = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "reward": "reward",
}
"""The metrics of objectives that a report shows, and their short names."""


def _metrics(report: StepReport) -> list[str]:
    found = report.metrics or {}
    return [f"{short} {found[n]:.3g}" for n, short in _METRICS.items() if n in found]


def describe(
    report: StepReport, iters: int | None, *, with_time_left: bool = True
) -> str:
    """Format a training report as a line of text of at most `LINE` columns.

    Args:
        report: The report.
        iters: Number of steps of the training.
        with_time_left: Whether to end with the time left, which a bar shows too.
    """
    parts = [
        f"step {report.step}" + (f"/{iters}" if iters and report.step <= iters else "")
    ]
    if report.val_loss is not None:
        parts.append(f"validation loss {report.val_loss:.4f}")
        return "  ".join([*parts, *_metrics(report)])
    if report.train_loss is not None:
        parts.append(f"loss {report.train_loss:.4f}")
    parts += _metrics(report)
    if report.learning_rate is not None:
        parts.append(f"lr {report.learning_rate:.2g}")
    if report.tokens_per_second is not None:
        parts.append(f"{report.tokens_per_second:.0f} tok/s")
    has_room = not report.metrics
    if has_room and report.delta_m is not None and report.delta_d is not None:
        parts.append(f"ΔM {report.delta_m:.2g} ΔD {report.delta_d:.2g}")
    line = "  ".join(parts)
    if with_time_left and report.steps_per_second and iters:
        left = duration((iters - report.step) / report.steps_per_second)
        line = f"{line}  {left} left" if len(line) + len(left) + 7 <= LINE else line
    return line


def _bars() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<9}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )


class WorkDisplay:
    """Context manager that shows progress bars on a terminal, nothing elsewhere.

    Args:
        with_memory: Show MLX's peak memory beside the bars.
    """

    def __init__(self, *, with_memory: bool = False) -> None:
        self._with_memory = with_memory
        self._tasks: dict[str, TaskID] = {}
        self._bars = _bars() if sys.stderr.isatty() and not is_quiet() else None

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def progress(self, phase: str, total: int, done: int) -> None:
        """Advance a bar by `done` steps or rows; remove it when it is full."""
        if self._bars is None:
            return
        task = self._task(phase, total)
        self._bars.advance(task, done)
        if self._with_memory:
            import mlx.core as mx

            self.note(phase, total, f"peak {size(mx.get_peak_memory())}")
        if all(bar.finished for bar in self._bars.tasks if bar.id == task):
            self._bars.remove_task(self._tasks.pop(phase))

    def note(self, phase: str, total: int, text: str) -> None:
        """Show text beside a bar."""
        if self._bars is not None:
            self._bars.update(self._task(phase, total), note=printable(text))

    def _task(self, phase: str, total: int) -> "TaskID":
        assert self._bars is not None
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(
                printable(phase), total=total, note=""
            )
        return self._tasks[phase]


class TrainDisplay(WorkDisplay):
    """Shows progress bars and training reports.

    Args:
        iters: Number of training steps; if None, set by the first call of `progress`.
    """

    def __init__(self, iters: int | None) -> None:
        super().__init__()
        self._iters = iters

    def progress(self, phase: str, total: int, done: int) -> None:
        """Advance a bar; for phase ``train``, also record the number of steps."""
        if phase == "train":
            self._iters = total
        super().progress(phase, total, done)

    def report(self, report: StepReport) -> None:
        """Print a training report."""
        iters = self._iters
        note(describe(report, iters, with_time_left=self._bars is None))
        if iters and report.train_loss is not None and report.step < iters:
            self.note("train", iters, f"peak {size(report.peak_memory_bytes)}")
