"""Preferences at the command line: training, plans, previews, bad rows."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_dora.cli.data import command as show
from mlx_dora.cli.train import command as train
from tests.train.saved import log


def pair(number: int) -> dict[str, object]:
    return {
        "prompt": [{"role": "user", "content": f"What is {number}?"}],
        "chosen": [{"role": "assistant", "content": ("even", "odd")[number % 2]}],
        "rejected": [{"role": "assistant", "content": "the lazy dog"}],
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, size in (("train", 20), ("valid", 4), ("test", 6)):
        text = "".join(json.dumps(pair(number)) + "\n" for number in range(size))
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def words(tiny_model_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model", str(tiny_model_folder), "--data", str(data), "--iters", "6"),
        *("--rank", "2", "--adapter-path", str(tmp_path / "out"), "--num-layers", "-1"),
        *("--objective", "dpo", "--learning-rate", "1e-2", "--steps-per-report", "3"),
    ]


def invoke(command: object, *words: str) -> Result:
    return CliRunner().invoke(command, words)  # pyright: ignore[reportArgumentType]


def test_dpo_trains_tests_and_resumes(words: list[str], tmp_path: Path) -> None:
    result = invoke(train, *words, "--test", "--train")
    assert result.exit_code == 0, result.output
    assert "Training: dpo, dora, rank 2" in result.stderr
    assert "Data: 20 train rows" in result.stderr
    assert "preferences as chat (prompt, chosen, rejected)" in result.stderr
    assert re.search(r"step 3/6  loss \S+  accuracy \S+  margin \S+", result.stderr)
    assert re.search(r"step 6/6  validation loss \S+  accuracy 1", result.stderr)
    tested = re.search(r"Test loss (\S+), rewards/chosen \S+,", result.stdout)
    assert tested and float(tested[1]) < 0.69
    steps = [line for line in result.stderr.splitlines() if line.startswith("step")]
    assert max(map(len, steps)) <= 80
    again = invoke(train, *words, "--resume", "--iters", "8")
    assert again.exit_code == 0, again.output
    assert log(tmp_path / "out")[-1]["step"] == 8


def test_a_plan_counts_both_rows_of_a_pair(words: list[str], tmp_path: Path) -> None:
    def peak(*more: str) -> int:
        path = tmp_path / "plan.json"
        done = invoke(
            train, *words, *more, "--plan", "--json", str(path), "--overwrite"
        )
        assert done.exit_code == 0, done.output
        plan = json.loads(path.read_text())["plan"]
        return plan["activations"] + plan["scores"]

    pairs, labels = (
        peak("--batch-size", "3"),
        peak("--batch-size", "6", "--objective", "kto"),
    )
    assert pairs == labels
    text = invoke(train, *words, "--plan").stdout
    assert "batches of 4 pairs of rows padded to" in text


def test_both_answers_are_shown_with_their_targets(
    words: list[str], data: Path
) -> None:
    result = invoke(show, str(data), *words[:2], "--objective", "dpo", "--rows", "1")
    assert result.exit_code == 0, result.output
    assert "line 1 (chosen) (train)" in result.stdout
    assert "⟦even<|im_end|>" in result.stdout
    assert "⟦the lazy dog<|im_end|>" in result.stdout


def test_a_bad_row_ends_the_command_in_one_line(
    words: list[str], data: Path, tmp_path: Path
) -> None:
    with (data / "train.jsonl").open("a") as file:
        file.write(json.dumps({**pair(1), "rejected": 3}) + "\n")
    result = invoke(train, *words)
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if "rejected" in line]
    assert "train.jsonl, line 21: 'rejected' must be text or a list" in error
    assert not (tmp_path / "out").exists()


def test_settings_of_preferences_need_their_objective(words: list[str]) -> None:
    result = invoke(train, *words, "--objective", "sft", "--beta", "0.2")
    assert result.exit_code == 1
    assert "do not apply to objective sft" in result.stderr
