"""Output of the demo: headings and tables on a terminal, plain text elsewhere."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_dora.cli._echo import show_command
from mlx_dora.cli._progress import TrainDisplay, duration, size
from mlx_dora.cli._shell import quote
from mlx_dora.errors import printable
from mlx_dora.train.run.journal import StepReport, TrainReport

if TYPE_CHECKING:  # they import MLX
    from mlx_dora.demo.changes import MatrixChange
    from mlx_dora.demo.script import DemoReport, Sample

TABLE_ROWS = 10
PLAIN_WIDTH = 80


class DemoView:
    """Context manager that prints the demo's results to stdout as they arrive.

    Args:
        iters: Number of training steps.
    """

    def __init__(self, iters: int) -> None:
        self._terminal = sys.stdout.isatty()
        width = None if self._terminal else PLAIN_WIDTH
        self._console = Console(highlight=False, markup=False, width=width)
        self._display = TrainDisplay(iters)
        self._open = ExitStack()
        self._bars_shown = False
        self._stages = 0

    def __enter__(self) -> "DemoView":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def stage(self, title: str, text: str) -> None:
        """Start a stage of the demo."""
        self._stages += 1
        line = Text(f"\n{self._stages}. {title}", style="bold cyan")
        line.append(f"  {text}", style="default not bold")
        self._console.print(line)

    def note(self, text: str) -> None:
        """Print a line within a stage."""
        self._console.print(Text(f"   {printable(text)}", style="dim"), soft_wrap=True)

    def step(self, report: StepReport) -> None:
        """Show a training report."""
        self._display.report(report)

    def progress(self, phase: str, total: int, done: int) -> None:
        """Advance the progress bars, which appear on the first call."""
        if not self._bars_shown:
            self._bars_shown = True
            self._open.enter_context(self._display)
        self._display.progress(phase, total, done)

    def trained(self, report: TrainReport) -> None:
        """Show the result of training."""
        self._open.close()
        before, after = report.first_val_loss, report.val_loss
        if before is not None and after is not None:
            line = f"Validation loss {before:.3f} before, {after:.3f} after: "
            result = Text(f"   {line}", style="bold")
            result.append(f"{after / before - 1:+.0%}", style="bold green")
            self._console.print(result)
        self.note(
            f"{report.trainable_parameters:,} parameters in {len(report.modules)} "
            f"matrices, {report.trained_tokens:,} answer tokens, "
            f"{duration(report.seconds)}, peak memory {size(report.peak_memory_bytes)}"
        )

    def changed(self, changes: "Sequence[MatrixChange]") -> None:
        """Show the matrices that changed most."""
        table = Table(box=box.SIMPLE_HEAD if self._terminal else None, pad_edge=True)
        for heading in ("matrix", "ΔM", "ΔM / ‖W‖", "ΔD", "mean angle"):
            table.add_column(
                heading, justify="left" if heading == "matrix" else "right"
            )
        for change in changes[:TABLE_ROWS]:
            table.add_row(
                change.path,
                f"{change.delta_m:.2e}",
                f"{change.delta_m_relative:.2%}",
                f"{change.delta_d:.2e}",
                f"{change.degrees:.2f}°",
            )
        self._console.print(table)
        if len(changes) > TABLE_ROWS:
            self.note(f"and {len(changes) - TABLE_ROWS} more")

    def sampled(self, samples: "Sequence[Sample]") -> None:
        """Show answers with and without the adapter."""
        for sample in samples:
            self._console.print(Text(f"   {sample.question}", style="bold"))
            grid = Table.grid(padding=(0, 1))
            answers = (
                ("base", sample.base),
                ("adapted", sample.adapted),
                ("docstring", sample.expected),
            )
            for who, text in answers:
                plain = printable(" ".join(text.split()))
                grid.add_row("    ", Text(who, style="dim"), Text(plain or "(nothing)"))
            self._console.print(grid)

    def finished(self, report: "DemoReport") -> None:
        """Show the check of the fused model and suggest next commands."""
        agreement = report.agreement
        self._console.print(
            Text(
                "   Fused and unfused agree: logits differ by "
                f"{agreement.relative_logit_difference:.1e} (relative)",
                style="bold",
            )
        )
        self.note(
            f"the loss by {abs(agreement.loss_difference):.1e}; the most likely token "
            f"is the same at {agreement.same_top_token:.1%} of {agreement.tokens} "
            "positions"
        )
        self._console.print(
            Text(f"\nDone in {duration(report.seconds)}. ", style="bold green")
            + Text("All files are in ")
            + Text(str(report.data.parent), style="bold")
            + Text("; delete this folder when you no longer need it.")
        )
        self._console.print("\nTry next, with this model:")
        for command in _commands(report):
            show_command(command)
        self._console.print("\nOr with your own model and data:")
        for command in _OWN:
            show_command(command)


_OWN = (
    "mlx_dora.train --model MODEL --data FOLDER --mask-prompt",
    "mlx_dora.evaluate --adapter-path adapters --data FOLDER --mask-prompt",
)


def _commands(report: "DemoReport") -> list[str]:
    adapter, fused, data = (
        quote(str(path)) for path in (report.adapter, report.fused, report.data)
    )
    prompt = '"What does Python\'s textwrap.dedent(text) do?"'
    return [
        f"mlx_dora.generate --adapter-path {adapter} --prompt {prompt}",
        f"mlx_dora.chat --adapter-path {adapter}",
        f"mlx_dora.evaluate --adapter-path {adapter} --data {data} --mask-prompt",
        f"mlx_lm.generate --model {fused} --prompt {prompt}",
    ]
