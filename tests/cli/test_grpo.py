"""GRPO from the command line: training, test, plan, preview and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_dora.cli.data import command as data_command
from mlx_dora.cli.train import command

ROWS = [
    {"prompt": f"the dog {number}", "answer": f"jumps {number}"} for number in range(8)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in {"train": ROWS, "valid": ROWS[:2], "test": ROWS[2:5]}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def arguments(tiny_model_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model", str(tiny_model_folder), "--data", str(data)),
        *("--objective", "grpo", "--reward-funcs", "exact_match,regex_match"),
        *("--reward-arguments", "{regex_match: {pattern: '[a-z ]+'}}"),
        *("--reward-weights", "[1, 0.5]", "--num-generations", "3"),
        *("--max-completion-length", "4", "--max-seq-length", "32"),
        *("--batch-size", "2", "--num-layers", "1", "--adapter-path"),
        str(tmp_path / "out"),
    ]


def run(*words: str) -> Result:
    return CliRunner().invoke(command, words)


def test_a_training_and_its_test(arguments: list[str], tmp_path: Path) -> None:
    more = (
        "--iters",
        "2",
        "--train",
        "--test",
        "--loss-type",
        "dr_grpo",
        "--beta",
        ".1",
    )
    result = run(*arguments, *more)
    assert result.exit_code == 0, result.output
    assert "Training: grpo, dora, rank 8, scale 20 in the last block" in result.output
    assert "2 steps of 2 prompts" in result.output
    assert "mlx_dora.evaluate" not in result.output
    line = next(t for t in result.output.splitlines() if t.startswith("Test loss"))
    assert ", reward 0." in line
    assert ", rewards/regex_match " in line
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    training = config["mlx_dora"]["training"]
    assert training["objective"] == "grpo"
    assert training["loss_type"] == "dr_grpo"
    assert training["beta"] == 0.1
    assert training["rewards"] == {"exact_match": 1, "regex_match": 0.5}


def test_the_plan_counts_completions(arguments: list[str]) -> None:
    found = []
    for more in ((), ("--num-generations", "6"), ("--max-completion-length", "20")):
        result = run(*arguments, *more, "--plan", "--json", "-")
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["plan"])
    first, more_rows, longer = found
    assert more_rows["activations"] == pytest.approx(2 * first["activations"], rel=1e-6)
    assert longer["length"] == first["length"] + 16
    assert first["longest_row"] == longer["longest_row"] - 16


def test_the_preview_shows_the_place_of_the_completion(
    tiny_model_folder: Path, data: Path
) -> None:
    words = [
        *(str(data), "--model", str(tiny_model_folder), "--objective", "grpo"),
        *("--reward-funcs", "exact_match", "--max-completion-length", "4"),
    ]
    result = CliRunner().invoke(data_command, words)
    assert result.exit_code == 0, result.output
    assert "the dog 0⟦<|im_end|>⟧" in result.output
    result = CliRunner().invoke(
        data_command, [*words, "--reward-funcs", "number_match"]
    )
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(data_command, [*words, "--reward-funcs", "valid"])
    assert result.exit_code == 1
    assert "reward 'valid' is unknown" in result.output


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--reward-funcs", "exact,regex_match"], "reward 'exact' is unknown"),
        (
            ["--reward-funcs", "regex_match,no_such_module.f"],
            "importing reward no_such_module.f",
        ),
        (["--reward-weights", "[1]"], "one weight for each of the 2 reward_funcs"),
        (["--loss-type", "sigmoid"], "loss_type must be grpo, bnpo, dr_grpo or dapo"),
        (["--loss-type", "grpo,dapo"], "got 'grpo,dapo'"),
        (["--max-completion-length", "32"], "leaves no room for a prompt"),
        (["--objective", "dpo"], "settings of grpo do not apply to objective dpo"),
        (["--label-smoothing", "0.1"], "settings of preferences do not apply"),
        (["--mask-prompt"], "mask_prompt does not apply to objective grpo"),
        (["--reference-adapter", "no"], "reference_adapter needs beta above 0"),
        (["--reference-adapter", "no", "--beta", ".1"], "no is not an adapter folder"),
        (["--top-p", "0"], "top_p must be above 0 and at most 1"),
    ],
)
def test_bad_settings_are_one_line(
    arguments: list[str], tmp_path: Path, more: list[str], reason: str
) -> None:
    result = run(*arguments, "--iters", "2", *more)
    assert result.exit_code == 1, result.output
    last: Any = result.output.strip().splitlines()[-1]
    assert reason in last
    assert not (tmp_path / "out").exists()
