import os
import pty
import re
import subprocess
import sys
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora.cli._log import logging_as_asked
from mlx_dora.cli._progress import (
    TrainDisplay,
    WorkDisplay,
    describe,
    duration,
    size,
)
from mlx_dora.train import StepReport


def report(**extra: Any) -> StepReport:
    values = {
        "step": 5,
        "trained_tokens": 9,
        "seconds": 1.0,
        "peak_memory_bytes": 10**9,
    }
    return StepReport(**{**values, **extra})


def test_lines_of_reports() -> None:
    trained = report(
        train_loss=1.25,
        learning_rate=1e-4,
        tokens_per_second=321.4,
        steps_per_second=0.5,
    )
    assert describe(trained, 65) == (
        "step 5/65  loss 1.2500  lr 0.0001  321 tok/s  2:00 left"
    )
    assert describe(report(val_loss=2.0), 65) == "step 5/65  validation loss 2.0000"


def test_durations_and_sizes() -> None:
    assert [duration(s) for s in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]
    assert [size(n) for n in (12_300_000, 2_340_000_000)] == ["12 MB", "2.34 GB"]


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_as_asked(), TrainDisplay(10) as display:
        display.progress("train", 10, 1)
        display.report(report(val_loss=2.0))
    out, errors = capsys.readouterr()
    assert (out, errors) == ("", "step 5/10  validation loss 2.0000\n")


def test_bars_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    display = TrainDisplay(10)
    with logging_as_asked(), display:
        display.progress("validate", 4, 4)
        display.report(report(train_loss=1.5, tokens_per_second=7.0))
        display.progress("train", 10, 5)
    out, errors = capsys.readouterr()
    assert out == ""
    assert "step 5/10  loss 1.5000" in errors
    assert "5/10" in errors
    assert "peak 1.00 GB" in errors


def test_time_left_and_peak_memory_beside_the_bar_of_a_merge(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 12_300_000)
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with WorkDisplay(with_memory=True) as display:
        for _ in range(5):
            display.progress("merge", 8, 1)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert re.search(r"merge .*5/8 0:00:\d\d 0:00:\d\d peak 12 MB", shown), shown


WARNS_WHILE_TRAINING = """
import logging
from mlx_dora.cli._log import logging_as_asked
from mlx_dora.cli._progress import TrainDisplay
with logging_as_asked(), TrainDisplay(10) as display:
    display.progress("train", 10, 5)
    logging.getLogger("mlx_dora.train").warning("finishing the step")
"""


def test_a_warning_has_its_own_line_above_the_bars() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WARNS_WHILE_TRAINING],
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's end of file: the terminal was closed
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    os.close(ours)
    before, _, _ = shown.decode().partition("warning: finishing the step")
    line = before.rpartition("\n")[2].rpartition("\r")[2]
    assert "train" in before
    assert "train" not in line
