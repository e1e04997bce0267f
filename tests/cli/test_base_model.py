import pytest

from mlx_dora.adapters import recorded_base
from mlx_dora.cli._base_model import announced_base
from mlx_dora.cli._log import logging_as_asked


def test_the_recorded_base_reaches_the_terminal_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "\x1b]0;title\x07base"
    monkeypatch.setattr(recorded_base, "recorded_base", lambda path: name)
    with logging_as_asked():
        assert announced_base("adapter") == name
    assert capsys.readouterr().err == (
        "Base: \\x1b]0;title\\x07base, as recorded by the adapter.\n"
    )
