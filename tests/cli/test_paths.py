"""Every option that accepts a path expands ``~`` and accepts any character."""

import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from mlx_dora.cli._framework import SETTINGS, PassThrough
from mlx_dora.cli._group import VERBS, group
from mlx_dora.cli._options import _Text
from mlx_dora.cli._paths import PathType
from tests.cli.material import make_material

FOLDER = "a b'c\nd"
TEXTS = {
    "train": {"project_name", "report_to", "upload_repo"},
    "fuse": {"upload_repo", "prompts"},
    "extract": {"keys"},
    "convert": {"base_gguf"},
    "merge adapters": {"own", "weights"},
    "merge fisher": {"keys"},
    "merge models": {"own", "weights"},
}
"""Options that accept free text but no path; the features name data set columns."""
FEATURES = {
    "prompt_feature", "completion_feature", "text_feature", "chat_feature"
}  # fmt: skip


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command that defines its own options, with the words that call it."""
    context = click.Context(group)
    for verb in VERBS:
        command = group.get_command(context, verb)
        assert command is not None
        if isinstance(command, click.Group):
            for name, subcommand in command.commands.items():
                yield f"{verb} {name}", subcommand
        elif not isinstance(command, PassThrough):
            yield verb, command


def parsed(name: str, command: click.Command, words: list[str]) -> click.Context:
    """Parse words as the command line does; click keeps the help option it makes."""
    return command.make_context(name, words, **SETTINGS)


def path_options() -> set[tuple[str, str]]:
    return {
        (words, str(param.name))
        for words, command in commands()
        for param in command.params
        if isinstance(param.type, PathType)
    }


def test_text_options_are_not_paths() -> None:
    for words, command in commands():
        free = {
            str(param.name)
            for param in command.params
            if param.type is click.STRING or isinstance(param.type, _Text)
        }
        assert free - FEATURES == TEXTS.get(words, set()), words


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "me"
    make_material(folder / FOLDER)
    settings = {
        "model": f"~/{FOLDER}/m0",
        "data": f"~/{FOLDER}/data",
        "iters": 1,
        "num_layers": -1,
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0},
    }
    pairs = [
        {"prompt": "the fox", "chosen": f" runs {i}", "rejected": " sleeps"}
        for i in range(4)
    ]
    (folder / FOLDER / "pairs").mkdir()
    (folder / FOLDER / "pairs" / "train.jsonl").write_text(
        "".join(json.dumps(pair) + "\n" for pair in pairs)
    )
    path = folder / FOLDER / "settings" / "train.yaml"
    path.write_text(yaml.safe_dump(settings))
    return folder


LINES = """
data @data --model @m0 --num-layers -1 --json @data.json --html @data.html
train -c @settings/train.yaml --model @m0 --data @data --adapter-path @trained
    --resume-adapter-file @a1 --keys self_attn.q_proj,mlp.up_proj --num-layers -1
    --batch-size 2 --val-batches 0 --json @0.json
train --model @m0 --data @pairs --objective dpo --reference-adapter @a1 --iters 1
    --num-layers -1 --batch-size 2 --val-batches 0 --adapter-path @preferred
fuse --model @m0 --adapter-path @a1 --save-path @fused --json @1.json
convert @a1 @to-peft --to peft --model @m0 --base-model @m0 --json @2.json
convert @a1 @to-lora --to lora --rank 2 --model @m0 --data @data --json @2l.json
evaluate -c @settings/evaluate.yaml --model @m0 --adapter-path @a1
    --fused-path @fused --data @data --samples 0 --num-batches 1 --json @evaluated.json
evaluate --model @m0 --adapter-path @a1 --adapter-path @a2 --data @data --samples 0
    --num-batches 1 --report @tasks.html
extract @m0 @fused --rank 2 --save-path @extracted --json @3.json
merge adapters @a1 @a2 --model @m0 --rank 2 --logit-error @data --save-path @both
    --json @4.json
merge adapters @a1 @a2 --method fisher --data @data --data @data --save-path @by-data
merge adapters @a1 @a1 --method fisher --fisher @f0 --fisher @f0 --save-path @by-fisher
merge fisher --model @m0 --adapter-path @a1 --data @data --num-batches 1
    --save-path @fisher --json @5.json
merge models @m0 @m1 --method fisher --fisher @f0 --fisher @f1 --save-path @by-rows
    --json @6.json
merge models @m1 --base @m0 --method task_arithmetic --save-path @added
merge models --config @settings/merge.yaml --save-path @mixed
analyze adapter @a1 --model @m0 --json @one.json --report @one.html
analyze compare @a1 @a2 --model @m0 --json @two.json --report @two.html
analyze models @m0 @fused --json @three.json --report @three.html
""".strip().replace("\n    ", " ").splitlines()  # fmt: skip
OUTPUTS = (
    *("--save-path", "--adapter-path", "--json", "--report", "--html"),
    "@to-peft",
    "@to-lora",
)


def run(words: list[str]) -> Result:
    result = CliRunner().invoke(group, words)
    assert result.exit_code == 0, (words, result.output, result.exception)
    return result


def test_every_path_option_accepts_home_space_quote_and_newline(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (home / FOLDER / "settings" / "evaluate.yaml").write_text("batch_size: 2\n")
    known = dict(commands())
    tried: set[tuple[str, str]] = set()
    for line in LINES:
        words = [
            f"~/{FOLDER}/{word[1:]}" if word[0] == "@" else word
            for word in line.split()
        ]
        name = next(command for command in known if line.startswith(f"{command} "))
        context = parsed(name, known[name], words[len(name.split()) :])
        tried |= {
            (name, option)
            for option, value in context.params.items()
            if str(home) in str(value)
        }
        tried |= {(name, "config")} if " -c " in line else set()
        run(words)
    # The demo takes minutes, so only its parsed options are checked.
    demo = parsed("demo", known["demo"], ["--output", "~/o", "--model", "~/m"])
    assert str(demo.params["output"]) == f"{home}/o"
    assert demo.params["model"] == f"{home}/m"
    doctor = parsed("doctor", known["doctor"], ["--model", "~/m"])
    assert doctor.params["model"] == f"{home}/m"
    untried = {("demo", "output"), ("demo", "model")}
    untried |= {("doctor", "json_output"), ("doctor", "model")}
    assert path_options() - tried == untried
    assert list(tmp_path.iterdir()) == []  # no folder named ~
    for name in ("trained", "fused", "to-peft", "fisher", "mixed", "extracted"):
        assert (home / FOLDER / name).is_dir()
    json.loads((home / FOLDER / "two.json").read_text())


def test_the_next_commands_work_as_printed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    line = f"train -c {shlex.quote(f'~/{FOLDER}/settings/train.yaml')} --val-batches 0"
    result = run([*shlex.split(line), "--adapter-path", f"~/{FOLDER}/next"])
    lines = result.stdout.partition("Next:")[2]
    shown = ["bash", "-c", "printf '%s\\0' " + " ".join(lines.split("\n"))]
    words = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    words = words.split("\0")[:-1]
    starts = [i for i, word in enumerate(words) if word.startswith("mlx_dora.")]
    said = [words[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]
    verbs = [line[0].removeprefix("mlx_dora.") for line in said]
    assert verbs == ["generate", "chat", "evaluate", "fuse"]
    for verb, line in zip(verbs, said, strict=True):
        assert f"{home}/{FOLDER}/next" in line
        if verb in ("evaluate", "fuse"):
            more = ["--samples", "0"] if verb == "evaluate" else []
            run([verb, *line[1:], *more])
    assert (home / FOLDER / "next-fused" / "config.json").exists()


@pytest.mark.parametrize("value", ["~nobody-of-this-name/x", "a\0b"])
def test_an_impossible_path_is_wrong_usage(value: str) -> None:
    result = CliRunner().invoke(group, ["extract", value, "m1", "--save-path", "o"])
    assert result.exit_code == 2
    assert "Invalid value for 'BASE'" in result.stderr
