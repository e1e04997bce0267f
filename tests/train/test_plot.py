from pathlib import Path
from typing import Any

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.train import StepReport, plot
from mlx_dora.train.plot import can_plot, plot_losses


def report(step: int, **losses: Any) -> StepReport:
    return StepReport(
        step=step, trained_tokens=1, seconds=1.0, peak_memory_bytes=1, **losses
    )


@pytest.mark.skipif(not can_plot(), reason="matplotlib is not installed")
def test_plot_is_a_png(tmp_path: Path) -> None:
    history = [report(0, val_loss=2.0), report(1, train_loss=1.0)]
    plot_losses(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(DoRAError, match=r"needs matplotlib: pip install matplotlib\.$"):
        plot_losses([], tmp_path / "loss.png")
