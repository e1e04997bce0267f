"""Shows a training that has no callback: live in a notebook, elsewhere in the log."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from html import escape

from mlx_dora.notebook import LiveOutput, html_table, in_notebook
from mlx_dora.progress import Progress
from mlx_dora.train.run.journal import StepReport

logger = logging.getLogger(__name__)

_COLUMNS = (
    *("step", "loss", "validation loss", "accuracy", "margin", "reward"),
    *("tokens/s", "ΔM", "ΔD"),
)
_SHOWN = 12
"""Number of reports in the table."""
_INTERVAL = 0.25
"""Least time between two changes of the view that are not reports, in seconds."""


class TrainingView:
    """A progress bar and the latest reports of a training, as HTML.

    Args:
        show: Receives the HTML and the same facts as a line of text, at the start and
            after every change.
        clock: Returns seconds.
    """

    def __init__(
        self,
        show: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._show, self._clock = show, clock
        self._rows: dict[int, dict[str, str]] = {}
        self._done: dict[str, tuple[int, int]] = {}
        self._began: tuple[float, int] | None = None
        self._shown_at = float("-inf")
        self._refresh("preparing the first step")

    def report(self, report: StepReport) -> None:
        """Add a report to the table; a validation shares the row of its step."""
        row = self._rows.setdefault(report.step, {"step": str(report.step)})
        metrics = report.metrics or {}
        row |= {
            name: f"{value:{form}}"
            for name, value, form in (
                ("loss", report.train_loss, ".4f"),
                ("validation loss", report.val_loss, ".4f"),
                ("accuracy", metrics.get("rewards/accuracies"), ".3f"),
                ("margin", metrics.get("rewards/margins"), ".3f"),
                ("reward", metrics.get("reward"), ".3f"),
                ("tokens/s", report.tokens_per_second, ".0f"),
                ("ΔM", report.delta_m, ".2g"),
                ("ΔD", report.delta_d, ".2g"),
            )
            if value is not None
        }
        self._refresh(self._now())

    def progress(self, phase: str, total: int, done: int) -> None:
        """Advance the bar of a phase by `done` steps or rows."""
        before = self._done.get(phase, (0, total))[0]
        if before >= total:  # the next validation
            before = 0
        self._done[phase] = before + done, total
        if phase == "train" and self._began is None:
            self._began = self._clock(), before + done
        if self._clock() - self._shown_at >= _INTERVAL or before + done >= total:
            self._refresh(self._now())

    def end(self, error: BaseException | None) -> None:
        """Say that the training has ended, and how."""
        step, total = self._done.get("train", (0, 0))
        ended = f"{step} of {total} steps"
        self._refresh(
            f"finished: {ended}"
            if error is None
            else f"stopped after {ended} ({type(error).__name__})"
        )

    def _now(self) -> str:
        step, total = self._done.get("train", (0, 0))
        text = f"step {step} of {total}" if total else "before the first step"
        rows, all_rows = self._done.get("validate", (0, 0))
        if rows < all_rows:
            return f"{text}, validating: {rows} of {all_rows} rows"
        if self._began is not None and step > self._began[1] and step < total:
            each = (self._clock() - self._began[0]) / (step - self._began[1])
            minutes, seconds = divmod(round(each * (total - step)), 60)
            text += f", {minutes}:{seconds:02} left"
        return text

    def _refresh(self, text: str) -> None:
        self._shown_at = self._clock()
        step, total = self._done.get("train", (0, 1))
        bar = f'<progress value="{step}" max="{total}"></progress> {escape(text)}'
        shown = {name for row in self._rows.values() for name in row}
        names = [name for name in _COLUMNS if name in shown]
        rows = [self._rows[step] for step in sorted(self._rows)[-_SHOWN:]]
        table = html_table(names, [[row.get(n, "") for n in names] for row in rows])
        last = rows[-1] if rows else {}
        latest = "  ".join(f"{n} {last[n]}" for n in names if n in last)
        self._show(f"{bar}{table if rows else ''}", f"{text}  {latest}".rstrip())


def watched(
    progress: Progress | None,
) -> AbstractContextManager[tuple[Callable[[StepReport], None], Progress | None]]:
    """Return what shows the reports of a training to which no callback was given.

    In a notebook, a view below the cell shows the progress and the latest reports,
    unless the caller shows the progress. Elsewhere each report is logged.

    Args:
        progress: The caller's progress callback.

    Returns:
        A context manager whose value is the listener and the progress callback.
    """
    if progress is not None or not in_notebook():
        return nullcontext((lambda report: logger.info("%s", report), progress))
    return _viewed()


@contextmanager
def _viewed() -> Iterator[tuple[Callable[[StepReport], None], Progress]]:
    view = TrainingView(LiveOutput().show)
    try:
        yield view.report, view.progress
    except BaseException as error:
        view.end(error)
        raise
    view.end(None)
