"""Plots the loss curves."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mlx_dora.errors import DoRAError
from mlx_dora.train.run.journal import StepReport

PLOT_NAME = "loss.png"


def can_plot() -> bool:
    """Whether matplotlib is installed (``pip install matplotlib``)."""
    return find_spec("matplotlib") is not None


def plot_losses(history: Sequence[StepReport], path: Path) -> None:
    """Plot training and validation loss over the steps as a PNG file.

    Args:
        history: The reports of a training.
        path: The file to write; an existing file is replaced atomically.

    Raises:
        DoRAError: If matplotlib is not installed.
    """
    if not can_plot():
        raise DoRAError("a loss plot needs matplotlib: pip install matplotlib.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # renders without a display, for every backend
    axes = figure.add_subplot()
    for name, label, style in (
        ("train_loss", "training", "-"),
        ("val_loss", "validation", "o--"),
    ):
        points = [
            (report.step, value)
            for report in history
            if (value := getattr(report, name)) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    aside = path.with_name(f".{path.name}.partial.png")
    try:
        figure.savefig(aside, dpi=144)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
