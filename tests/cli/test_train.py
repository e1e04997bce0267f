import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_dora.cli.train import command
from tests.cli.training_data import write_data
from tests.processes import Process, run

# mlx-lm's own example without its comments and with small numbers.
HOST_YAML = """
model: "{model}"
train: true
fine_tune_type: {kind}
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true
data: "{data}"
seed: 0
num_layers: 1
batch_size: 4
iters: 4
val_batches: 25
learning_rate: 1e-3
steps_per_report: 2
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "{adapter}"
save_every: 100
test: true
test_batches: 100
max_seq_length: 256
grad_checkpoint: true
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 4
  scale: 20.0
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 2
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", train=20, valid=4, test=6)


@pytest.fixture
def small(tiny_model_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    """Return options for a training run that takes a second."""
    return [
        *("--model", str(tiny_model_folder), "--data", str(data), "--iters", "3"),
        *("--rank", "2", "--adapter-path", str(tmp_path / "out"), "--num-layers", "1"),
    ]


def invoke(*args: str) -> Result:
    result = CliRunner().invoke(command, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(result: Result) -> list[str]:
    """The lines on stderr after the line that says how the data are read."""
    lines = result.stderr.strip().splitlines()
    return lines[lines[0].startswith("Data: ") :]


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_a_yaml_of_mlx_lm_works_unchanged(
    tiny_model_folder: Path, data: Path, tmp_path: Path, kind: str
) -> None:
    from mlx_lm.utils import load

    adapter = tmp_path / "out"
    path = tmp_path / "lora.yaml"
    path.write_text(
        HOST_YAML.format(model=tiny_model_folder, data=data, adapter=adapter, kind=kind)
    )
    done = run(["-m", "mlx_dora.train", "--config", path])
    assert done.returncode == 0, done.stderr
    assert "Validation loss" in done.stdout
    assert "Test loss" in done.stdout
    assert "step 4/4  loss" in done.stderr
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == kind
    assert config["lora_parameters"]["rank"] == 4
    assert config["mlx_dora"]["training"]["optimizer_config"]["bias_correction"]
    assert config["num_layers"] == 1
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    load(str(tiny_model_folder), adapter_path=str(adapter))


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        (["doran-aux", "--aux-width", "2"], {"aux_width": 2}),
        (["edora"], {}),
        (["bidora", "--magnitude-share", "0.3"], {"magnitude_share": 0.3}),
        (["adaptive", "--rank-every", "1"], {"rank_every": 1, "rank_rounds": 8}),
    ],
)
def test_a_variant_is_trained_resumed_and_recorded(
    small: list[str], tmp_path: Path, options: list[str], recorded: dict[str, Any]
) -> None:
    first = invoke(*small, "--variant", *options)
    assert first.exit_code == 0, first.output
    again = invoke(*small, "--variant", *options, "--iters", "5", "--resume")
    assert again.exit_code == 0, again.output
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    training = config["mlx_dora"]["training"]
    assert training["steps"] == 5
    assert training["variant"] == options[0]
    assert recorded.items() <= training.items()


def test_flags_beat_the_file(small: list[str], tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("iters: 50\nlora_parameters: {scale: 3.0, rank: 7}\n")
    result = invoke("-c", str(path), *small)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["mlx_dora"]["training"]["steps"] == 3
    assert config["lora_parameters"]["rank"] == 2
    assert config["lora_parameters"]["scale"] == 3.0


def test_results_go_to_stdout_and_progress_to_stderr(
    small: list[str], tmp_path: Path
) -> None:
    from mlx_dora.train.plot import can_plot

    result = invoke("--train", "--test", *small, "--mask-prompt")
    assert result.exit_code == 0, result.output
    assert "step 0/3  validation loss" in result.stderr
    assert "step 3/3  loss" in result.stderr
    assert "step" not in result.stdout.replace("steps", "")
    assert f"Adapter: {tmp_path / 'out'}" in result.stdout
    assert "mlx_dora.generate --adapter-path" in result.stdout
    assert "mlx_dora.fuse --adapter-path" in result.stdout
    assert "Test loss" in result.stdout
    assert ("Loss plot: " in result.stdout) == can_plot()
    assert (tmp_path / "out" / "loss.png").exists() == can_plot()


def test_a_missing_matplotlib_is_reported(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_dora.train import plot

    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    result = invoke(*small)
    assert "No loss plot: pip install matplotlib" in result.stdout


def test_test_without_training_measures_an_adapter(
    small: list[str], tmp_path: Path
) -> None:
    result = invoke("--test", *small)
    assert result.exit_code == 1
    assert "set train too" in result.stderr
    assert not (tmp_path / "out").exists()
    assert invoke(*small).exit_code == 0
    before = (tmp_path / "out" / "adapters.safetensors").read_bytes()
    result = invoke("--test", *small)
    assert result.exit_code == 0, result.output
    assert "Test loss" in result.stdout
    assert "Adapter:" not in result.stdout
    assert (tmp_path / "out" / "adapters.safetensors").read_bytes() == before


def test_an_adapter_is_replaced_only_with_overwrite(small: list[str]) -> None:
    assert invoke(*small).exit_code == 0
    refused = invoke(*small)
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr
    assert invoke(*small, "--overwrite").exit_code == 0


def test_missing_validation_data_is_reported(small: list[str], data: Path) -> None:
    (data / "valid.jsonl").unlink()
    result = invoke(*small, "--valid-share", "0")
    assert result.exit_code == 0
    assert "no validation data" in result.stderr
    assert "validation loss" not in result.output


def test_rows_are_held_out_and_said_if_no_file_validates(
    small: list[str], data: Path
) -> None:
    (data / "valid.jsonl").unlink()
    result = invoke(*small)
    assert result.exit_code == 0
    assert "2 of 20 training rows" in result.stderr
    assert (
        f"Data: 18 train rows ({data}/train.jsonl), 2 valid rows ({data}/train.jsonl); "
        "prompt and completion (prompt, completion); " in result.stderr
    )
    assert "validation loss" in result.stderr


def test_forgotten_data_is_said(small: list[str]) -> None:
    place = small.index("--data")
    result = invoke(*small[:place], *small[place + 2 :])
    assert result.exit_code == 1
    assert "\nError: --data was not given: name a folder" in result.stderr


def test_cache_threshold_accepts_sizes(small: list[str]) -> None:
    assert invoke(*small, "--clear-cache-threshold", "1.5GB").exit_code == 0
    bad = invoke(*small, "--clear-cache-threshold", "much")
    assert bad.exit_code == 2
    assert "is not a size such as 500MB" in bad.stderr


BAD: dict[str, tuple[list[str], int, str]] = {
    "unknown data folder": (["--data", "no/such/folder"], 1, "does not exist"),
    "unknown model": (["--model", "no/such/model"], 1, "no/such/model"),
    "rank 0": (["--rank", "0"], 1, "rank must be at least 1, got 0"),
    "NaN scale": (["--scale", "nan"], 1, "scale must be a finite number"),
    "bad number": (["--iters", "many"], 2, "'many'"),
    "unknown flag": (["--no-such-flag"], 2, "--no-such-flag"),
    "unknown key": (["--keys", "q_prog"], 1, "q_prog"),
    "unknown optimizer": (["--optimizer", "lion"], 2, "lion"),
    "no layers": (["--num-layers", "0"], 1, "nothing to train"),
    "no folder for the adapter": (["--adapter-path", ""], 1, "adapter_path is empty"),
    "nothing to do": (["--no-train"], 1, "nothing to do"),
    "missing config": (["-c", "none.yaml"], 1, "none.yaml"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_line_and_leaves_nothing(
    small: list[str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, code, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = invoke(*small, *extra, "--quiet")
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert len(refusal(result)) == 1, result.stderr
    assert result.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.jsonl is empty"),
        (
            '{"question": "a"}\n',
            "line 1: expected the columns 'prompt' and 'completion'",
        ),
        ('{"text": "a"}\n{"txt": "b"}\n', "line 2: expected the key 'text'"),
        ("not json\n", "line 1: not JSON"),
    ],
)
def test_bad_data_is_one_line_and_leaves_nothing(
    small: list[str], data: Path, tmp_path: Path, content: str, message: str
) -> None:
    (data / "train.jsonl").write_text(content)
    result = invoke(*small, "-q")
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_data_cut_before_its_targets_is_refused(
    small: list[str], tmp_path: Path
) -> None:
    result = invoke(*small, "--max-seq-length", "2", "--mask-prompt", "-q")
    assert result.exit_code == 1, result.output
    assert "no row has a target token within max_seq_length 2" in result.stderr
    assert len(refusal(result)) == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_in_the_yaml_is_reported(
    small: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("learning_rte: 1e-5\n")
    result = invoke("-c", str(path), *small)
    assert result.exit_code == 1
    assert "learning_rte (did you mean learning_rate" in result.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_saves_and_exits_with_130(small: list[str], tmp_path: Path) -> None:
    process = Process(["-m", "mlx_dora.train", *small, "--iters", "100000"])
    log = tmp_path / "out" / "log.jsonl"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (
        log.exists() and "train_loss" in log.read_text()
    ):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "the adapter is in" in errors
    assert "--iters 100000 --resume\n" in errors.partition("To resume:")[2]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["mlx_dora"]["training"]["steps"] >= 10


def test_help_needs_no_mlx_lm() -> None:
    code = (
        "import sys; from mlx_dora.cli.train import command\n"
        "try: command(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'mlx_lm', 'transformers'}\n"
        "print(sorted(heavy & {n.split('.')[0] for n in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("[]")


def test_a_resumed_run_says_from_where_and_a_finished_one_that_it_is(
    small: list[str],
) -> None:
    assert invoke(*small).exit_code == 0
    more = invoke(*small, "--resume", "--iters", "5")
    assert "Resuming from step 3 of 5" in more.stderr
    assert "Trained 2 more steps, 5 in all: " in more.stdout
    done = invoke(*small, "--resume", "--iters", "5")
    assert "already finished: 5 of 5 steps; raise --iters to continue" in done.stderr
    assert "Trained" not in done.stdout
    beyond = invoke(*small, "--resume", "--iters", "4")
    assert "already finished: 5 steps, more than --iters 4" in beyond.stderr
    assert "5/4" not in beyond.output


def test_model_data_settings_and_parameters_precede_the_first_step(
    small: list[str], data: Path
) -> None:
    lines = invoke(*small, "--learning-rate", "1e-3").stderr.splitlines()
    assert lines[0] == f"Model: {small[1]}"
    assert lines[1] == (
        "Training: dora, rank 2, scale 20 in the last block; 3 steps of 4 rows, "
        "adam, learning rate 0.001"
    )
    assert lines[3] == (
        f"Data: 20 train rows ({data}/train.jsonl), 4 valid rows ({data}/valid.jsonl); "
        "prompt and completion (prompt, completion); the loss counts prompts, too "
        "(mask_prompt: answers only)"
    )
    assert re.fullmatch(
        r"Trainable: [\d,]+ of [\d,]+ parameters \([\d.]+ %\) in 7 modules", lines[4]
    )
    assert re.fullmatch(
        r"Batches: 5 an epoch, of (1 shape|2 shapes), [\d.]+% padding", lines[5]
    )
    assert lines[6].startswith("step 0/3  validation loss")


def test_json_of_a_training_goes_to_stdout_alone(small: list[str]) -> None:
    result = invoke(*small, "--test", "--train", "--json", "-")
    values = json.loads(result.stdout)
    assert values["train"]["steps"] == 3
    assert values["train"]["history"][-1]["step"] == 3
    assert values["test"]["perplexity"] == pytest.approx(
        math.exp(values["test"]["loss"])
    )


def test_a_test_alone_takes_the_base_from_the_adapter(small: list[str]) -> None:
    assert invoke(*small).exit_code == 0
    result = invoke("--test", *small[2:])
    assert result.exit_code == 0, result.output
    assert f"Base: {small[1]}, as recorded by the adapter." in result.stderr
    assert "Test loss" in result.stdout
