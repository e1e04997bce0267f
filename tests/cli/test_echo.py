import logging
import sys

import click
import pytest
from click.testing import CliRunner

from mlx_dora.cli._echo import echo, note
from mlx_dora.cli._framework import verb
from mlx_dora.cli._log import logging_as_asked
from mlx_dora.errors import MAX_LENGTH

HOSTILE = "\x1b]0;TITLE\x07\x1b[2J\nnext"
SHOWN = r"\x1b]0;TITLE\x07\x1b[2J\nnext"


def run(body) -> tuple[str, str]:
    @verb("act")
    def command() -> None:
        """Act."""
        body()

    result = CliRunner().invoke(command, [], color=True)
    return result.stdout, result.stderr


def test_control_characters_are_escaped_and_our_own_style_is_kept() -> None:
    stdout, _ = run(lambda: echo(HOSTILE, bold=True))
    assert stdout == f"\x1b[1m{SHOWN}\x1b[0m\n"


@pytest.mark.parametrize("error", [OSError, click.ClickException, click.UsageError])
def test_every_error_is_one_short_line_without_control_characters(error: type) -> None:
    def body() -> None:
        raise error(HOSTILE + "x" * 70_000)

    _, stderr = run(body)
    assert "\x1b" not in stderr
    assert stderr.startswith(r"Error: \x1b]0;TITLE\x07\x1b[2J")
    assert stderr.count("\n") == 1
    assert len(stderr) < MAX_LENGTH + 100


def test_a_file_name_in_an_error_is_escaped() -> None:
    def body() -> None:
        raise FileNotFoundError(2, "No such file", "a\x1b[2Jb")

    assert run(body)[1] == "Error: a\\x1b[2Jb: No such file\n"


def test_a_warning_is_one_short_line_without_control_characters() -> None:
    def body() -> None:
        logging.getLogger("mlx_dora.x").warning("%s", HOSTILE + "x" * 70_000)

    _, stderr = run(body)
    assert stderr.startswith(f"warning: {SHOWN}xxx")
    assert len(stderr) < MAX_LENGTH + 100
    assert "\x1b" not in stderr


def test_bars_show_names_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from mlx_dora.cli._progress import WorkDisplay

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with WorkDisplay() as display:
        display.progress("[bold]\x1b]0;T\x07", 2, 1)
        display.note("[bold]\x1b]0;T\x07", 2, "[red]\x1b]0;N\x07")
        with logging_as_asked():
            note("\x1b]0;S\x07")
    shown = terminal.getvalue()
    assert "\x1b]0;" not in shown
    for text in (r"[bold]\x1b]0;T\x07", r"[red]\x1b]0;N\x07", r"\x1b]0;S\x07"):
        assert text in shown
