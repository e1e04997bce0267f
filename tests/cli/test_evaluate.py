import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_dora import DoRAConfig, apply_dora, load, save_adapter
from mlx_dora.cli.evaluate import command
from mlx_dora.fuse.model import fuse_model
from mlx_dora.train.run.start import trainable_tensors
from tests.adapters.training import train
from tests.cli.training_data import write_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", valid=8)


@pytest.fixture
def adapter(tiny_model_folder: Path, tmp_path: Path) -> Path:
    model = load(tiny_model_folder)[0]
    apply_dora(model, DoRAConfig(rank=2, num_layers=-1))
    changed = [(name, value + 0.05) for name, value in trainable_tensors(model).items()]
    model.load_weights(changed, strict=False)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def invoke(*args: object) -> Result:
    result = CliRunner().invoke(command, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_base_adapter_and_fused_side_by_side(
    tiny_model_folder: Path, adapter: Path, data: Path, tmp_path: Path
) -> None:
    fused, report = tmp_path / "fused", tmp_path / "report.json"
    fuse_model(str(tiny_model_folder), adapter, fused)
    models = ["--model", tiny_model_folder, "--adapter-path", adapter]
    result = invoke(
        *models, "--fused-path", fused, "--data", data, "--json", report, "--samples", 2
    )
    assert result.exit_code == 0, result.output
    comparison = json.loads(report.read_text())
    base, adapted, plain = comparison["results"]
    assert [entry["name"] for entry in comparison["results"]] == [
        "base",
        "adapter",
        "fused",
    ]
    assert comparison["split"] == "valid"
    assert base["loss"]["loss"] != pytest.approx(adapted["loss"]["loss"], rel=1e-3)
    assert plain["loss"]["perplexity"] == pytest.approx(
        adapted["loss"]["perplexity"], rel=1e-3
    )
    assert comparison["agreement"]["relative_logit_difference"] < 1e-4
    assert comparison["agreement"]["max_logit_difference"] > 0
    assert adapted["labels"]["labels"] == {"even": 4, "odd": 4}
    assert len(comparison["prompts"]) == len(adapted["samples"]) == 2
    for part in ("base", "adapter", "fused", "perplexity", "accuracy", "sample 2"):
        assert part in result.stdout


def test_base_alone_with_json_on_stdout(tiny_model_folder: Path, data: Path) -> None:
    result = invoke(
        *("--model", tiny_model_folder, "--data", data, "--json", "-"),
        *("--samples", 0, "--no-labels", "--num-batches", 1, "--batch-size", 3),
    )
    assert result.exit_code == 0, result.output
    comparison = json.loads(result.stdout)
    assert [entry["loss"]["rows"] for entry in comparison["results"]] == [3]
    assert comparison["results"][0]["labels"] is None
    assert comparison["agreement"] is None


def test_test_data_is_preferred(
    tiny_model_folder: Path, data: Path, tmp_path: Path
) -> None:
    write_data(data, test=2)
    options = ["--model", tiny_model_folder, "--data", data, "--samples", 0]
    assert "test data: 2 rows" in invoke(*options).stdout
    assert "valid data: 8 rows" in invoke(*options, "--split", "valid").stdout


BAD = {
    "no model": (["--model", "no/such/model"], 1, "no/such/model"),
    "no adapter": (["--adapter-path", "no/adapter"], 1, "no/adapter"),
    "no fused model": (["--fused-path", "no/fused/model"], 1, "no/fused/model"),
    "no data": (["--data", "no/such/data"], 1, "does not exist"),
    "no split": (["--split", "train"], 1, "has no train data"),
    "bad split": (["--split", "dev"], 2, "dev"),
    "no batches": (["--num-batches", "0"], 1, "num_batches must be -1 or at least 1"),
    "bad samples": (["--samples", "-1"], 1, "samples must be at least 0, got -1"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_line(tiny_model_folder: Path, data: Path, name: str) -> None:
    extra, code, message = BAD[name]
    result = invoke("--model", tiny_model_folder, "--data", data, *extra, "-q")
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


def test_the_base_recorded_by_the_adapter_is_used(
    tiny_model_folder: Path, data: Path, tmp_path: Path
) -> None:
    model, _ = load(tiny_model_folder)
    train(model)
    save_adapter(model, tmp_path / "adapter", base_model=str(tiny_model_folder))
    words = ("--adapter-path", tmp_path / "adapter", "--data", data, "--samples", "0")
    recorded = invoke(*words)
    assert recorded.exit_code == 0, recorded.output
    given = invoke(*words, "--model", tiny_model_folder)
    assert recorded.stdout == given.stdout


def test_model_or_adapter_is_required(data: Path) -> None:
    result = invoke("--data", data)
    assert result.exit_code == 2
    assert "--model" in result.stderr


def test_a_fused_model_has_no_table(
    tiny_model_folder: Path, adapter: Path, data: Path
) -> None:
    words = ("--adapter-path", adapter, "--data", data, "--data", data)
    result = invoke(*words, "--fused-path", tiny_model_folder)
    assert result.exit_code == 2
    assert "--fused-path is compared with one adapter" in result.stderr


def test_a_file_names_one_adapter_or_several(
    tiny_model_folder: Path, adapter: Path, data: Path, tmp_path: Path
) -> None:
    config = tmp_path / "evaluate.yaml"
    common = f"model: {tiny_model_folder}\ndata: {data}\nsamples: 0\n"
    config.write_text(f"{common}adapter_path: {adapter}\n")
    one = invoke("-c", config)
    assert one.exit_code == 0, one.output
    assert "perplexity" in one.stdout
    config.write_text(f"{common}adapter_path: [{adapter}, {adapter}]\n")
    two = invoke("-c", config)
    assert two.exit_code == 0, two.output
    assert [line.split()[0] for line in two.stdout.splitlines() if "adapter" in line]
    assert "adapter (2)" in two.stdout
