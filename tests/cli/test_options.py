import dataclasses
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from mlx_dora.cli._framework import verb
from mlx_dora.cli._options import dataclass_options
from mlx_dora.errors import DoRAError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    batch_size: int = dataclasses.field(default=4, metadata={"help": "Rows a step."})
    learning_rate: float = 1e-5
    optimizer: Literal["adam", "sgd"] = "adam"
    grad_checkpoint: bool = False
    packed: bool = True
    schedule: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"adam": {}}
    )
    hub: dict[str, Any] | list[Any] | None = None
    resume: Path | None = None
    num_layers: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DoRAError(f"batch_size must be at least 1, got {self.batch_size}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    rank: int = dataclasses.field(default=8, metadata={"flags": ("-r",)})
    keys: tuple[str, ...] | None = None
    num_layers: int = 16


seen: dict[str, Any] = {}


@verb("fit")
@dataclass_options(train=Training, dora=Adapter, exclude=("hub",))
@click.option("--model", required=True)
def command(train: Training, dora: Adapter, model: str) -> None:
    """Fit."""
    seen.update(train=train, dora=dora, model=model)


def fit(*args: str) -> tuple[int, str]:
    seen.clear()
    result = CliRunner().invoke(command, ["--model", "m", *args])
    return result.exit_code, result.output


def test_without_flags_the_objects_are_the_defaults() -> None:
    assert fit() == (0, "")
    assert seen == {"train": Training(), "dora": Adapter(), "model": "m"}


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("--batch-size 2", {"batch_size": 2}),
        ("--learning-rate 1e-4", {"learning_rate": 1e-4}),
        ("--optimizer sgd", {"optimizer": "sgd"}),
        ("--grad-checkpoint", {"grad_checkpoint": True}),
        ("--no-packed", {"packed": False}),
        ("--resume a/b", {"resume": Path("a/b")}),
        (
            "--schedule {name: cosine, a: [1e-5]}",
            {"schedule": {"name": "cosine", "a": [1e-5]}},
        ),
    ],
)
def test_flag_becomes_a_field(flags: str, changed: dict[str, Any]) -> None:
    assert fit(*flags.split(" ", 1))[0] == 0
    assert seen["train"] == dataclasses.replace(Training(), **changed)


def test_names_are_split_at_commas() -> None:
    fit("--keys", "self_attn.q_proj, mlp.up_proj")
    assert seen["dora"].keys == ("self_attn.q_proj", "mlp.up_proj")


def test_a_second_flag_comes_from_the_metadata() -> None:
    fit("-r", "3")
    assert seen["dora"].rank == 3


def test_a_shared_field_is_one_option_for_both() -> None:
    fit("--num-layers", "-1")
    assert seen["train"].num_layers == seen["dora"].num_layers == -1


def test_an_excluded_field_has_no_option() -> None:
    code, output = fit("--hub", "x")
    assert code == 2
    assert "--hub" in output


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch-size", "1.5"),
        ("--batch-size", "many"),
        ("--batch-size", "nan"),
        ("--learning-rate", "fast"),
        ("--optimizer", "adan"),
        ("--schedule", "cosine"),
        ("--schedule", "{a"),
        ("--batch-siz", "1"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(flags: tuple[str, str]) -> None:
    code, output = fit(*flags)
    assert code == 2
    assert output.count("\n") == 1
    assert flags[0] in output


def test_a_value_the_config_refuses_is_one_line_and_exit_code_1() -> None:
    assert fit("--batch-size", "0") == (
        1,
        "Error: batch_size must be at least 1, got 0.\n",
    )


def test_help_comes_from_the_fields() -> None:
    code, output = fit("--help")
    assert code == 0
    assert "--batch-size INTEGER" in output
    assert "Rows a step.  [default: 4]" in output
    assert "-r, --rank" in output or "--rank, -r" in output


def test_two_defaults_for_an_option_are_an_error() -> None:
    @dataclasses.dataclass
    class Other:
        rank: int = 16

    with pytest.raises(TypeError, match="two defaults"):
        dataclass_options(dora=Adapter, other=Other)


def test_a_type_without_an_option_is_an_error() -> None:
    @dataclasses.dataclass
    class Other:
        value: complex = 0j

    with pytest.raises(TypeError, match="no option type"):
        dataclass_options(other=Other)
