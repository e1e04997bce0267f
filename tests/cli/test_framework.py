import errno
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlx_dora import openblas
from mlx_dora.cli._environment import multiply_exactly
from mlx_dora.cli._framework import verb
from mlx_dora.cli._group import VERBS, group
from mlx_dora.errors import DoRAError


def command_that(body: Callable[[], int | None]) -> click.Command:
    @verb("act")
    def command() -> int | None:
        """Act."""
        return body()

    return command


def raising(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DoRAError("rank must be at least 1, got 0."), 1, "Error: rank must be"),
        (
            FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a/b"),
            1,
            "Error: a/b: No such file or directory",
        ),
        (OSError("the disk is full"), 1, "Error: the disk is full"),
        (click.UsageError("give one of both"), 2, "Error: give one of both"),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_line(
    error: BaseException, code: int, line: str
) -> None:
    result = CliRunner().invoke(command_that(raising(error)), [])
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.strip().startswith(line)
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_bug_keeps_its_traceback() -> None:
    result = CliRunner().invoke(command_that(raising(ValueError("ours"))), [])
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_returned_int_is_the_exit_code(returned: int | None, code: int) -> None:
    assert CliRunner().invoke(command_that(lambda: returned), []).exit_code == code


def test_library_warnings_go_to_stderr() -> None:
    def body() -> None:
        logging.getLogger("mlx_dora.somewhere").warning("%d rows are zero", 3)
        click.echo("done")

    result = CliRunner().invoke(command_that(body), [])
    assert (result.stdout, result.stderr) == ("done\n", "warning: 3 rows are zero\n")


def test_openblas_is_loaded_before_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(openblas, "preload", lambda: calls.append("openblas"))
    CliRunner().invoke(command_that(lambda: calls.append("body")), [])
    assert calls == ["openblas", "body"]


def test_every_verb_has_a_command_and_an_entry_point() -> None:
    for name in VERBS:
        command = importlib.import_module(f"mlx_dora.cli.{name}").command
        assert command.name == name
        assert command.help


def test_console_scripts_are_the_verbs() -> None:
    file = Path(__file__).parents[2] / "pyproject.toml"
    scripts = tomllib.loads(file.read_text())["project"]["scripts"]
    expected = {f"mlx_dora.{name}": f"mlx_dora.cli.{name}:command" for name in VERBS}
    assert scripts == {"mlx_dora": "mlx_dora.cli._group:group", **expected}


def test_group_lists_the_verbs() -> None:
    output = CliRunner().invoke(group, ["--help"]).output
    assert all(f"\n  {name} " in output for name in VERBS)


@pytest.mark.parametrize(
    "args", [["trian"], ["--no-such"], ["generat", "--model", "x"]]
)
def test_group_refuses_unknown_arguments(args: list[str]) -> None:
    result = CliRunner().invoke(group, args)
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1


def test_group_suggests_a_verb() -> None:
    assert "did you mean train?" in CliRunner().invoke(group, ["trian"]).output


HOSTED = ("generate", "chat", "server")


@pytest.mark.parametrize("name", [v for v in VERBS if v not in HOSTED] + ["group"])
def test_help_imports_no_host(name: str) -> None:
    args = ["--help"] if name == "group" else [name, "--help"]
    code = (
        "import sys\n"
        "from mlx_dora.cli._group import group\n"
        f"try: group({args!r})\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'mlx_lm', 'transformers', 'torch', 'matplotlib', 'mlx', 'numpy', "
        "'rich', 'huggingface_hub', 'safetensors'}\n"
        "print('heavy:', sorted(heavy & {m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_python_m_runs_the_group_and_a_verb() -> None:
    for args in (["mlx_dora", "doctor", "--help"], ["mlx_dora.doctor", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", *args], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("Usage: mlx_dora")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mlx_dora.merge adapters", "0"),
        ("mlx_dora fuse", "0"),
        ("mlx_dora.analyze adapter", "0"),
        ("mlx_dora.train", None),
        ("mlx_dora.generate", None),
    ],
)
def test_commands_that_write_weights_multiply_in_full_float32(
    path: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")  # restored at the end
    monkeypatch.delenv("MLX_ENABLE_TF32")
    multiply_exactly(path)
    assert os.environ.get("MLX_ENABLE_TF32") == value
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    multiply_exactly(path)
    assert os.environ["MLX_ENABLE_TF32"] == "1"  # the user's own setting stays


def test_a_verb_sets_it_before_its_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")  # restored at the end
    monkeypatch.delenv("MLX_ENABLE_TF32")
    seen = []

    @verb("fuse")
    def command() -> None:
        """Look."""
        seen.append(os.environ.get("MLX_ENABLE_TF32"))

    CliRunner().invoke(command, [], prog_name="mlx_dora.fuse")
    assert seen == ["0"]
