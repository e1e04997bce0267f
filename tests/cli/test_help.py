"""Help, hints and the options that every command has."""

import logging
import re
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from mlx_dora.cli._echo import detail, echo, note
from mlx_dora.cli._framework import PassThrough, verb
from mlx_dora.cli._group import VERBS, group
from mlx_dora.cli._help import ORDER
from mlx_dora.cli._log import GENERAL
from tests.cli.test_paths import commands

ALL = [*dict(commands())]


def shown(*words: str) -> str:
    return CliRunner().invoke(group, [*words, "--help"]).output


@pytest.mark.parametrize("words", ALL)
def test_help_has_two_examples_of_the_command_and_fits_80_columns(words: str) -> None:
    text = shown(*words.split())
    examples = text.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
    verb_name = words.split()[0]
    assert 1 <= len(examples) <= 2 or words == "demo"
    assert all(line.startswith(f"  mlx_dora.{verb_name}") for line in examples)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("words", ALL)
def test_the_options_of_an_example_exist(words: str) -> None:
    command = dict(commands())[words]
    flags = {flag for param in command.params for flag in param.opts}
    for line in command.examples:  # pyright: ignore[reportAttributeAccessIssue]
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", line)) <= flags | {"--plan"}


def test_the_groups_of_train_start_with_the_common_options() -> None:
    titles = re.findall(r"^([A-Z].*):$", shown("train"), re.MULTILINE)
    expected = [title for title in (*ORDER, GENERAL) if title != "Options"]
    assert titles == ["Examples", *expected]
    common = shown("train").partition("Common options:")[2].partition("\n\n")[0]
    for flag in ("--model", "--data", "--iters", "--rank", "--adapter-path", "--plan"):
        assert f"  {flag} " in common


def test_defaults_are_shown() -> None:
    text = " ".join(shown("train").split())
    for default in ("1000", "1e-05", "dora", "no-mask-prompt", "adapters"):
        assert f"[default: {default}]" in text


@pytest.mark.parametrize("words", ["", "merge", "analyze"])
def test_a_bare_group_prints_its_help_on_stdout(words: str) -> None:
    result = CliRunner().invoke(group, words.split())
    assert result.exit_code == 2
    assert result.stdout == shown(*words.split())
    assert result.stderr == ""


@pytest.mark.parametrize("words", ["", *VERBS, "merge adapters", "analyze models"])
def test_every_command_says_its_version(words: str) -> None:
    from mlx_dora import __version__

    result = CliRunner().invoke(group, [*words.split(), "--version"])
    assert result.stdout == f"mlx_dora, version {__version__}\n", result.output


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("train --lr 1", "there is no option --lr; did you mean --learning-rate?"),
        ("train --output x", "did you mean --adapter-path?"),
        ("fuse --output x", "did you mean --save-path?"),
        ("train --steps 4", "did you mean --iters?"),
        ("train --modle x", "did you mean --model?"),
        ("fuse --zzz", "there is no option --zzz. (see"),
        ("train --keys a b", "Separate several names with commas: --keys a,b."),
        ("analyze .", "put one of adapter, compare, models before it"),
        ("analyze compar a", "did you mean compare?"),
        ("merge adapters a b --weights .5 .5 --save-path c", "--weights 0.3,0.7"),
    ],
)
def test_a_mistake_gets_a_hint(line: str, hint: str) -> None:
    result = CliRunner().invoke(group, line.split())
    assert result.exit_code == 2
    assert hint in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@verb("act")
def act() -> None:
    """Act."""
    detail("a detail")
    note("a note")
    logging.getLogger("mlx_dora.x").warning("a warning")
    echo("a result")


@pytest.mark.parametrize(
    ("flags", "stderr"),
    [
        ([], "a note\nwarning: a warning\n"),
        (["-q"], "warning: a warning\n"),
        (["--verbose"], "a detail\na note\nwarning: a warning\n"),
    ],
)
def test_quiet_and_verbose(flags: list[str], stderr: str) -> None:
    result = CliRunner().invoke(act, flags)
    assert (result.stdout, result.stderr) == ("a result\n", stderr)


def test_a_log_file_gets_everything_with_times(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        result = CliRunner().invoke(act, ["-q", "--log-file", str(path)])
        assert result.stderr == "warning: a warning\n"
    lines = path.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == 2 * [
        "DEBUG a detail",
        "INFO a note",
        "WARNING a warning",
        "INFO a result",
    ]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", lines[0])


def test_a_log_file_gets_the_error(tmp_path: Path) -> None:
    path = tmp_path / "log"
    words = ["extract", "no/base", "no/tuned", "--rank", "1", "--save-path", "x"]
    result = CliRunner().invoke(group, [*words, "--log-file", str(path)])
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1].removeprefix("Error: ")
    assert path.read_text().endswith(f" ERROR {error}\n")
    assert result.stderr.count(error) == 1


def test_a_hosted_command_keeps_its_own_arguments() -> None:
    command = dict(hosted())["generate"]
    words = ["--prompt", "-x", "-q", "--log-file", "l", "--max-tokens", "3"]
    context = command.make_context("generate", words)
    assert context.args == ["--prompt", "-x", "--max-tokens", "3"]


def hosted() -> list[tuple[str, click.Command]]:
    with click.Context(group) as context:
        found = [(name, group.get_command(context, name)) for name in VERBS]
    return [(name, c) for name, c in found if isinstance(c, PassThrough)]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["train", "--adapter-path"], "dir"),
        (["train", "--model"], "dir"),
        (["train", "--config"], "file"),
        (["analyze", "adapter", "x", "--report"], "file"),
    ],
)
def test_the_shell_completes_folders_and_files(words: list[str], kind: str) -> None:
    completion = ShellComplete(group, {}, "mlx_dora", "_MLX_DORA_COMPLETE")
    (item,) = completion.get_completions(words, "ada")
    assert (item.type, item.value) == (kind, "ada")
