"""Progress on stderr: live bars on a terminal, plain lines or nothing elsewhere."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mlx_dora.cli._echo import echo
from mlx_dora.errors import printable
from mlx_dora.train.run.journal import StepReport


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int) -> str:
    """A number of bytes as MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def describe(report: StepReport, iters: int | None) -> str:
    """One line for one report."""
    parts = [f"step {report.step}" + (f"/{iters}" if iters else "")]
    if report.val_loss is not None:
        return f"{parts[0]}  validation loss {report.val_loss:.4f}"
    if report.train_loss is not None:
        parts.append(f"loss {report.train_loss:.4f}")
    if report.learning_rate is not None:
        parts.append(f"lr {report.learning_rate:.3g}")
    if report.tokens_per_second is not None:
        parts.append(f"{report.tokens_per_second:.0f} tokens/s")
    if report.delta_m is not None and report.delta_d is not None:
        parts.append(f"ΔM {report.delta_m:.2g} ΔD {report.delta_d:.2g}")
    parts.append(f"peak {size(report.peak_memory_bytes)}")
    if report.steps_per_second and iters:
        left = duration((iters - report.step) / report.steps_per_second)
        parts.append(f"{left} left")
    return "  ".join(parts)


class WorkDisplay:
    """Bars on a terminal, nothing elsewhere; a context manager.

    Args:
        with_memory: Put the most memory that MLX has held beside the bars.
    """

    def __init__(self, *, with_memory: bool = False) -> None:
        self._with_memory = with_memory
        self._tasks: dict[str, TaskID] = {}
        self._bars: Progress | None = None
        if sys.stderr.isatty():
            self._bars = Progress(
                TextColumn("{task.description:<9}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
            )

    def __enter__(self) -> "WorkDisplay":
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
        """Take note of steps or rows done; a bar that is full goes away."""
        if self._bars is None:
            return
        task = self._task(phase, total)
        self._bars.advance(task, done)
        if self._with_memory:
            import mlx.core as mx

            self.note(phase, total, f"peak {size(mx.get_peak_memory())}")
        if all(one.finished for one in self._bars.tasks if one.id == task):
            self._bars.remove_task(self._tasks.pop(phase))

    def say(self, line: str) -> None:
        """Print a line, above the bars if there are any."""
        if self._bars is None:
            echo(line, err=True)
        else:
            self._bars.console.print(printable(line), highlight=False, markup=False)

    def note(self, phase: str, total: int, text: str) -> None:
        """Put a text beside a bar."""
        if self._bars is not None:
            self._bars.update(self._task(phase, total), note=printable(text))

    def _task(self, phase: str, total: int) -> TaskID:
        assert self._bars is not None
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(
                printable(phase), total=total, note=""
            )
        return self._tasks[phase]


class TrainDisplay(WorkDisplay):
    """Shows a training's reports too.

    Args:
        iters: Steps of the training; None until `progress` tells.
    """

    def __init__(self, iters: int | None) -> None:
        super().__init__()
        self._iters = iters

    def progress(self, phase: str, total: int, done: int) -> None:
        """Take note of steps or rows done, and of how many steps there will be."""
        if phase == "train":
            self._iters = total
        super().progress(phase, total, done)

    def report(self, report: StepReport) -> None:
        """Take a report of the training."""
        self.say(describe(report, self._iters))
        iters = self._iters
        if iters and report.train_loss is not None and report.step < iters:
            self.note("train", iters, _note(report))


def _note(report: StepReport) -> str:
    loss, speed = report.train_loss or 0.0, report.tokens_per_second or 0.0
    peak = size(report.peak_memory_bytes)
    return f"loss {loss:.3f}  {speed:.0f} tokens/s  peak {peak}"
