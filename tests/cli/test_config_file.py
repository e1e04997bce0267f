import dataclasses
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mlx_dora.cli._config_file import config_file_option
from mlx_dora.cli._framework import verb
from mlx_dora.cli._options import dataclass_options
from mlx_dora.cli._yaml import parse_yaml


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    iters: int = 1000
    learning_rate: float = 1e-5
    grad_checkpoint: bool = False
    rank: int = 8
    scale: float = 20.0
    keys: tuple[str, ...] | None = None
    lr_schedule: dict[str, Any] | None = None


seen: list[Any] = []


@verb("fit")
@config_file_option
@dataclass_options(config=Config)
@click.option("--model", required=True)
@click.option("--train/--no-train", "is_training", default=True)
def command(config: Config, model: str, is_training: bool) -> None:
    """Fit."""
    seen[:] = [config, model, is_training]


@pytest.fixture
def fit(tmp_path: Path) -> Any:
    def call(text: str, *args: str) -> tuple[int, str]:
        seen.clear()
        file = tmp_path / "config.yaml"
        file.write_text(text, encoding="utf-8")
        result = CliRunner().invoke(command, ["-c", str(file), *args])
        return result.exit_code, result.output

    return call


MLX_LM_CONFIG = """
model: "org/model"   # required here, so the file can satisfy it
train: true
learning_rate: 1e-4
iters: 1e2
grad_checkpoint: true
lr_schedule:
  name: cosine_decay
  warmup: 100
  arguments: [1e-5, 1000, 1e-7]
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 4
  scale: 10
"""


def test_a_file_in_mlx_lms_form_sets_the_options(fit: Any) -> None:
    assert fit(MLX_LM_CONFIG) == (0, "")
    schedule = {
        "name": "cosine_decay",
        "warmup": 100,
        "arguments": [1e-5, 1000, 1e-7],
    }
    expected = Config(
        iters=100,
        learning_rate=1e-4,
        grad_checkpoint=True,
        rank=4,
        scale=10.0,
        keys=("self_attn.q_proj", "self_attn.v_proj"),
        lr_schedule=schedule,
    )
    assert seen == [expected, "org/model", True]


def test_a_flag_beats_the_file(fit: Any) -> None:
    fit(MLX_LM_CONFIG, "--rank", "2", "--no-grad-checkpoint", "--model", "other")
    assert (seen[0].rank, seen[0].grad_checkpoint, seen[1]) == (2, False, "other")


def test_null_keeps_the_default(fit: Any) -> None:
    assert fit("model: m\nrank: null\nlora_parameters: null\nconfig: x")[0] == 0
    assert seen[0] == Config()


def test_dashes_in_keys_are_underscores(fit: Any) -> None:
    fit("model: m\nlearning-rate: 0.5")
    assert seen[0].learning_rate == 0.5


def test_unknown_keys_are_all_named_with_near_ones(fit: Any) -> None:
    code, output = fit("model: m\nlearning_rat: 1\nlora_parameters: {rnak: 3}\nzzz: 1")
    assert code == 1
    assert output.count("\n") == 1
    assert "learning_rat (did you mean learning_rate" in output
    assert "lora_parameters.rnak (did you mean rank" in output
    assert "zzz." in output


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("model: [a", 1, "not valid YAML"),
        ("- a\n- b", 1, "must hold"),
        ("model: m\nmodel: n", 1, "twice"),
        ("model: m\nrank: 2\nlora_parameters: {rank: 3}", 1, "one option"),
        ("model: m\nlora_parameters: 3", 1, "must be a mapping"),
        ("model: m\niters: 1.5", 2, "whole number"),
        ("model: m\niters: true", 2, "whole number"),
        ("model: m\nlearning_rate: true", 2, "not a number"),
        ("model: m\nlr_schedule: cosine", 2, "mapping"),
        ("model: m\nkeys: [1, 2]", 2, "names"),
        ("model: m\ngrad_checkpoint: 7", 1, "true or false"),
        ("model: [a, b]", 1, "must be text"),
        ("", 2, "--model"),
    ],
)
def test_a_bad_file_is_one_line(fit: Any, text: str, code: int, told: str) -> None:
    got, output = fit(text)
    assert got == code
    assert output.count("\n") == 1
    assert told in output


def test_a_missing_file_is_one_line() -> None:
    result = CliRunner().invoke(command, ["-c", "no/such.yaml"])
    assert result.exit_code == 1
    assert result.output == "Error: no/such.yaml: No such file or directory\n"


@pytest.mark.parametrize(
    "text", ["1e-5", "1E5", "-1e+3", "1.", ".5", "1.5e-3", ".inf", "1_000.5", "12", "a"]
)
def test_numbers_are_read_as_mlx_lm_reads_them(text: str) -> None:
    import yaml
    from mlx_lm.lora import yaml_loader

    ours = parse_yaml(text, "it")
    theirs = yaml.load(text, yaml_loader)
    assert (ours, type(ours)) == (theirs, type(theirs))


def test_mlx_lms_own_defaults_are_all_keys_of_train(tmp_path: Path) -> None:
    """An mlx_lm YAML works unchanged, whatever of its keys it sets."""
    import yaml
    from mlx_lm.lora import CONFIG_DEFAULTS

    from mlx_dora.cli._config_file import default_map
    from mlx_dora.cli.train import command as train

    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(CONFIG_DEFAULTS))
    given = default_map(file, train.params)
    assert given["learning_rate"] == 1e-5
    assert given["rank"] == 8
