import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_dora.cli.doctor import command
from mlx_dora.doctor import diagnosis as module
from mlx_dora.doctor.checks import LayerCheck
from mlx_dora.doctor.diagnosis import Diagnosis
from mlx_dora.doctor.surroundings import disk_rows, hub_row, optional_rows


def diagnosed(**changes: object) -> Diagnosis:
    values = {"sections": {}, "traps": [], "wrong": (), "is_slow": False}
    return Diagnosis(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def test_the_verdict_names_what_is_wrong_before_what_is_slow() -> None:
    assert diagnosed().verdict.endswith("works on this machine: all results are right.")
    assert "slowly" in diagnosed(is_slow=True).verdict
    wrong = diagnosed(is_slow=True, wrong=("float32", "adapted_norm"))
    assert wrong.verdict == "WRONG RESULTS on this machine: float32, adapted_norm."
    assert not wrong.is_healthy


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the measurements, which take seconds."""
    check = LayerCheck(name="float32", error=1e-7, bound=1e-5, base_us=1.0, dora_us=2.0)
    monkeypatch.setattr(module, "check_layers", lambda: [check])
    monkeypatch.setattr(module, "matmul_gflops", lambda *_: 100.0)
    monkeypatch.setattr(module, "device_backend", lambda: "reference")
    monkeypatch.setattr(module, "examine", lambda: pytest.fail("no kernel on a CPU"))


@pytest.mark.usefixtures("quick")
def test_a_cpu_report_starts_with_the_verdict_and_has_no_kernels() -> None:
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "mlx_dora works on this machine: all results are right."
    assert not any(line.startswith(("Kernels", "Ops")) for line in lines)
    assert "  kernels            none on a CPU: plain MLX computes" in lines
    assert max(map(len, lines)) <= 80
    for label in ("matplotlib", "wandb", "datasets", "working folder", "Hub login"):
        assert any(line.startswith(f"  {label} ") for line in lines), label


@pytest.mark.usefixtures("quick")
def test_json_has_the_verdict_and_the_sections() -> None:
    values = json.loads(CliRunner().invoke(command, ["--json", "-"]).stdout)
    assert values["verdict"] == "mlx_dora works on this machine: all results are right."
    assert values["wrong"] == []
    assert values["sections"]["Machine"]["device"] == "CPU"
    assert set(values["sections"]["Disk and Hub"]) == {
        "working folder",
        "Hub cache",
        "Hub login",
    }


def test_a_token_is_reported_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert hub_row() == ("Hub login", "a token is stored")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", "/no/such/file")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert hub_row()[1].startswith("none (")


def test_free_space_is_that_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 2_340_000_000})
    asked: list[Path] = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or usage)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no"))
    monkeypatch.chdir(tmp_path)
    rows = disk_rows()
    assert rows == [("working folder", "2.3 GB free"), ("Hub cache", "2.3 GB free")]
    assert asked == [tmp_path, tmp_path]


def test_a_missing_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = {"matplotlib": "3.10"}
    monkeypatch.setattr("mlx_dora.doctor.surroundings.installed_version", versions.get)
    rows = dict(optional_rows())
    assert rows["matplotlib"] == "3.10"
    assert rows["wandb"] == ("not installed (for --report-to wandb): pip install wandb")
