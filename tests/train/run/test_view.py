"""A training without a callback is visible: in a notebook, and in the log."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from mlx_dora.train import StepReport
from mlx_dora.train.run.view import TrainingView
from tests.cli.training_data import write_data


def report(step: int, **values: Any) -> StepReport:
    return StepReport(
        step=step, trained_tokens=1, seconds=1.0, peak_memory_bytes=1, **values
    )


class Screen:
    """What a view shows, and the clock that it reads."""

    def __init__(self) -> None:
        self.pages: list[str] = []
        self.lines: list[str] = []
        self.time = 0.0
        self.view = TrainingView(self.show, lambda: self.time)

    def show(self, html: str, text: str) -> None:
        self.pages.append(html)
        self.lines.append(text)


def test_a_view_counts_steps_and_says_the_time_left() -> None:
    screen = Screen()
    for screen.time in (10.0, 12.0, 14.0):  # the first step may compile
        screen.view.progress("train", 40, 1)
    assert screen.lines[-1] == "step 3 of 40, 1:14 left"
    assert '<progress value="3" max="40"></progress>' in screen.pages[-1]


def test_a_resumed_run_does_not_count_the_steps_of_the_earlier_one() -> None:
    screen = Screen()
    screen.view.progress("train", 40, 30)
    screen.time = 5.0
    screen.view.progress("train", 40, 1)
    assert screen.lines[-1] == "step 31 of 40, 0:45 left"


def test_a_validation_shares_the_row_of_its_step() -> None:
    screen = Screen()
    screen.view.report(report(0, val_loss=3.0))
    screen.view.report(report(10, train_loss=2.5, tokens_per_second=31.7))
    screen.view.report(report(10, val_loss=2.25))
    assert screen.pages[-1].endswith(
        "<table><tr><th>step</th><th>loss</th><th>validation loss</th><th>tokens/s</th>"
        "</tr><tr><td>0</td><td></td><td>3.0000</td><td></td></tr>"
        "<tr><td>10</td><td>2.5000</td><td>2.2500</td><td>32</td></tr></table>"
    )
    line = "step 10  loss 2.5000  validation loss 2.2500  tokens/s 32"
    assert screen.lines[-1].endswith(line)


def test_a_view_shows_validations_and_the_latest_reports() -> None:
    screen = Screen()
    screen.time = 1.0
    screen.view.progress("validate", 8, 4)
    assert screen.lines[-1] == "before the first step, validating: 4 of 8 rows"
    for step in range(20):
        screen.view.report(report(step, train_loss=1.0))
    assert screen.pages[-1].count("<tr>") == 1 + 12
    assert "<td>19</td>" in screen.pages[-1]
    screen.view.progress("validate", 8, 4)
    screen.view.progress("validate", 8, 2)
    screen.time = 2.0
    screen.view.progress("validate", 8, 1)
    assert ", validating: 3 of 8 rows" in screen.lines[-1]


def test_a_view_is_not_redrawn_at_every_short_step() -> None:
    screen = Screen()
    for i in range(1000):
        screen.time = i / 1000
        screen.view.progress("train", 1000, 1)
    assert 3 <= len(screen.pages) <= 7
    assert screen.lines[-1] == "step 1000 of 1000"


def test_a_view_says_how_the_training_ended() -> None:
    screen = Screen()
    screen.view.progress("train", 4, 3)
    screen.view.end(KeyboardInterrupt())
    assert screen.lines[-1] == "stopped after 3 of 4 steps (KeyboardInterrupt)"
    screen.view.end(None)
    assert screen.lines[-1] == "finished: 3 of 4 steps"


def test_without_a_callback_reports_are_logged_and_nothing_is_printed(
    run: Callable[..., object],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.INFO, "mlx_dora"):
        run(iters=2, steps_per_report=1, val_batches=0)
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 1", "step 2"]
    assert capsys.readouterr() == ("", "")
    caplog.clear()
    with caplog.at_level(logging.INFO, "mlx_dora"):
        run("b", iters=1, steps_per_report=1, val_batches=0, callback=lambda _: None)
    assert not [line for line in caplog.messages if line.startswith("step ")]


SCRIPT = """
import sys
{prepare}
from mlx_dora import DoRAConfig, TrainConfig, finetune, load, load_datasets
train = TrainConfig(model={model!r}, data={data!r}, iters=3, batch_size=2,
                    steps_per_report=1, val_batches=1)
model, tokenizer = load({model!r})
rows = load_datasets(train, tokenizer)
report = finetune(model, tokenizer, rows["train"], rows["valid"], train=train,
                  dora=DoRAConfig(rank=2, num_layers=1), adapter_path={adapter!r}{more})
"""


@pytest.fixture
def script(tiny_model_folder: Path, tmp_path: Path) -> Callable[..., str]:
    data = write_data(tmp_path / "data", train=8, valid=4, test=4)

    def make(prepare: str = "", more: str = "") -> str:
        paths = (tiny_model_folder, data, tmp_path / "adapter")
        model, data_path, adapter = map(str, paths)
        return SCRIPT.format(
            prepare=prepare, model=model, data=data_path, adapter=adapter, more=more
        )

    return make


NO_WIDGETS = "import warnings; warnings.filterwarnings('ignore', 'IProgress not found')"
"""The package tqdm misses ipywidgets and says so."""


def outputs(source: str) -> list[dict]:
    """Execute a cell in a fresh IPython kernel."""
    cell = nbformat.v4.new_code_cell(source)
    book = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    return book.cells[0].outputs


def test_a_notebook_shows_one_view_that_ends_finished(
    script: Callable[..., str],
) -> None:
    shown = outputs(script(NO_WIDGETS))
    assert [kind["output_type"] for kind in shown] == ["display_data"], shown
    html = shown[0]["data"]["text/html"]
    assert '<progress value="3" max="3"></progress> finished: 3 of 3 steps' in html
    assert "<th>validation loss</th>" in html
    assert html.count("<tr>") == 1 + 4  # steps 0 to 3
    assert shown[0]["data"]["text/plain"].startswith("finished: 3 of 3 steps  step 3")


def test_a_notebook_with_a_callback_shows_what_the_callback_shows(
    script: Callable[..., str],
) -> None:
    shown = outputs(script(NO_WIDGETS, more=", callback=print"))
    assert {kind["output_type"] for kind in shown} == {"stream"}
    text = "".join(kind["text"] for kind in shown)
    assert text.startswith("step 0  validation loss ")
    assert text.count("\n") == 5  # steps 0 to 3, and the last validation


def test_a_plain_script_is_silent_until_it_asks_for_the_log(
    script: Callable[..., str],
) -> None:
    def run_script(source: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, check=True
        )

    silent = run_script(script())
    assert (silent.stdout, silent.stderr) == ("", "")
    again = script("import logging; logging.basicConfig(level=logging.INFO)")
    logged = run_script(again.replace("iters=3", "iters=3, overwrite=True"))
    assert logged.stdout == ""
    assert "INFO:mlx_dora.train.run.view:step 3  loss " in logged.stderr
