"""Every command that has results writes them as JSON, by one rule."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from mlx_dora.cli._framework import verb
from mlx_dora.cli._group import group
from mlx_dora.cli._json import JsonOutput, json_option
from tests.cli.material import make_material
from tests.cli.test_paths import commands


@verb("act")
@json_option(overwrite=True)
def act(json_output: JsonOutput) -> None:
    """Act."""
    json_output.check()
    click.echo("chatter of a library")
    json_output.write({"a": float("nan"), "b": (1, Path("x")), "c": {"é": 0.5}})


VALUES = {"a": None, "b": [1, "x"], "c": {"é": 0.5}}


def run(*words: str) -> Result:
    return CliRunner().invoke(act, list(words))


def test_a_dash_is_stdout_and_nothing_else_is_there() -> None:
    result = run("--json", "-")
    assert json.loads(result.stdout) == VALUES
    assert result.stderr == "chatter of a library\n"


def test_a_file_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    path = str(tmp_path / "r.json")
    assert run("--json", path).exit_code == 0
    assert json.loads(Path(path).read_text()) == VALUES
    refused = run("--json", path)
    assert refused.exit_code == 1
    assert refused.stderr == f"Error: {path} exists; add --overwrite to replace it.\n"
    assert run("--json", path, "--overwrite").exit_code == 0


def test_a_missing_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    result = run("--json", str(tmp_path / "no" / "r.json"))
    assert result.exit_code == 1
    assert "there is no folder" in result.stderr
    assert "chatter" not in result.output


WITH_RESULTS = (
    *("train", "fuse", "extract", "convert", "evaluate", "doctor"),
    *("merge adapters", "merge models", "merge fisher"),
    *("analyze adapter", "analyze compare", "analyze models"),
)


def test_the_commands_with_results_have_json_and_overwrite() -> None:
    flags = {
        words: {flag for param in command.params for flag in param.opts}
        for words, command in commands()
    }
    for words in WITH_RESULTS:
        assert flags[words] >= {"--json", "--overwrite"}, words


LINES = {
    "fuse --adapter-path a1 --save-path fused": ("kept", 1.0),
    "convert a1 to-peft": ("to", "peft"),
    "convert peft to-mlx": ("to", "mlx"),
    "extract m0 m1 --rank 2 --save-path extracted": ("save_path", "extracted"),
    "merge adapters a1 a2 --save-path two": ("method", "slerp"),
    "merge adapters a1 a2 a1 --save-path three": ("method", "karcher"),
    "merge models m0 m1 --save-path models": ("method", "slerp"),
    "merge fisher --adapter-path a1 --data data --save-path f": ("save_path", "f"),
    "analyze compare a1 a2": ("kind", "comparison"),
    "evaluate --adapter-path a1 --data data --samples 0": ("split", "test"),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("json") / "m", fisher=False)


@pytest.mark.parametrize("line", LINES)
def test_a_command_prints_its_results_alone(
    material: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(material)
    result = CliRunner().invoke(group, [*line.split(), "--json", "-"])
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    key, expected = LINES[line]
    if isinstance(expected, float):
        expected = pytest.approx(expected, rel=1e-4)
    assert values[key] == expected
