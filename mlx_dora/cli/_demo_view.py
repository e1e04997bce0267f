"""How the demo looks: headings and tables on a terminal, plain text elsewhere."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_dora.cli._progress import TrainDisplay, duration, size
from mlx_dora.cli._shell import quote
from mlx_dora.errors import printable
from mlx_dora.train.run.journal import StepReport, TrainReport

if TYPE_CHECKING:  # they import MLX
    from mlx_dora.demo.changes import MatrixChange
    from mlx_dora.demo.script import DemoReport, Sample

TABLE_ROWS = 10
PLAIN_WIDTH = 100


class DemoView:
    """Shows the demo's results on stdout as they come; a context manager.

    Args:
        iters: Steps of the training.
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
        """Begin a part."""
        self._stages += 1
        line = Text(f"\n{self._stages}. {title}", style="bold cyan")
        line.append(f"  {text}", style="default not bold")
        self._console.print(line)

    def note(self, text: str) -> None:
        """Say one line within a part."""
        self._console.print(Text(f"   {printable(text)}", style="dim"), soft_wrap=True)

    def step(self, report: StepReport) -> None:
        """Show a report of the training."""
        self._display.report(report)

    def progress(self, phase: str, total: int, done: int) -> None:
        """Move the bars, which appear with the first move."""
        if not self._bars_shown:
            self._bars_shown = True
            self._open.enter_context(self._display)
        self._display.progress(phase, total, done)

    def trained(self, report: TrainReport) -> None:
        """Show what the training came to."""
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
        """Show the most changed matrices."""
        table = Table(box=box.SIMPLE_HEAD if self._terminal else None, pad_edge=True)
        for heading in ("matrix", "ΔM", "ΔM / ‖W‖", "ΔD", "mean angle"):
            table.add_column(
                heading, justify="left" if heading == "matrix" else "right"
            )
        for one in changes[:TABLE_ROWS]:
            table.add_row(
                one.path,
                f"{one.delta_m:.2e}",
                f"{one.delta_m_relative:.2%}",
                f"{one.delta_d:.2e}",
                f"{one.degrees:.2f}°",
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
        """Show the check of the fused model and what to do next."""
        found = report.agreement
        self._console.print(
            Text(
                "   Fused and unfused agree: logits differ by "
                f"{found.relative_logit_difference:.1e} (relative)",
                style="bold",
            )
        )
        self.note(
            f"the loss by {abs(found.loss_difference):.1e}; the likeliest token is the "
            f"same at {found.same_top_token:.1%} of {found.tokens} positions"
        )
        self._console.print(
            Text(f"\nDone in {duration(report.seconds)}. ", style="bold green")
            + Text("All of it is in ")
            + Text(str(report.data.parent), style="bold")
            + Text("; delete the folder when you have seen it.")
        )
        self._console.print("\nTry next, with the model that is there:")
        for command in _commands(report):
            self._console.print(f"  {printable(command)}", soft_wrap=True)
        self._console.print("\nand with your own model and data:")
        for command in _OWN:
            self._console.print(f"  {command}", soft_wrap=True)


_OWN = (
    "mlx_dora.train --model MODEL --data FOLDER --adapter-path adapter --mask-prompt",
    "mlx_dora.evaluate --model MODEL --adapter-path adapter --data FOLDER",
)


def _commands(report: "DemoReport") -> list[str]:
    model, adapter, fused, data = (
        quote(str(path))
        for path in (report.model, report.adapter, report.fused, report.data)
    )
    prompt = '"What does Python\'s textwrap.dedent(text) do?"'
    both = f"--model {model} --adapter-path {adapter}"
    return [
        f"mlx_dora.generate {both} --prompt {prompt}",
        f"mlx_dora.chat {both}",
        f"mlx_dora.evaluate {both} --data {data} --mask-prompt",
        f"mlx_lm.generate --model {fused} --prompt {prompt}",
    ]
