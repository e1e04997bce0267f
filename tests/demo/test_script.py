import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import dora_layers
from mlx_dora.cli.demo import command
from mlx_dora.demo.changes import matrix_changes
from mlx_dora.demo.config import DemoConfig
from mlx_dora.demo.script import run_demo
from mlx_dora.errors import DoRAError
from tests.checks import to_numpy


@pytest.fixture
def roomy_folder(make_tiny_folder: Callable[..., Path]) -> Path:
    return make_tiny_folder("roomy", hidden_size=64, intermediate_size=96)


def test_the_command_runs_the_whole_demo(roomy_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    options = ["--model", str(roomy_folder), "--output", str(output), "--iters", "3"]
    result = CliRunner().invoke(command, options)
    assert result.exit_code == 0, result.output
    titles = ("Model", "Data", "Training", "Changes", "Answers", "Fuse")
    for number, title in enumerate(titles, 1):
        assert f"{number}. {title}" in result.stdout
    assert "before" in result.stdout and "Fused and unfused agree" in result.stdout
    assert "\x1b[" not in result.stdout
    assert "mlx_dora.train --model MODEL" in result.stdout
    parts = ["adapter", "data", "fused"]
    assert sorted(path.name for path in output.iterdir()) == parts
    assert json.loads((output / "adapter/adapter_config.json").read_text())
    load(roomy_folder, output / "adapter")
    load(output / "fused")


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(DoRAError, match="already exists"):
        run_demo(DemoConfig(output=tmp_path, model="there is no such model"))


def test_a_wrong_model_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    with pytest.raises(DoRAError):
        run_demo(DemoConfig(output=output, model=str(tmp_path / "nothing")))
    assert not output.exists()


def test_running_twice_makes_two_folders(
    tmp_path: Path, roomy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = DemoConfig(model=str(roomy_folder), iters=1)
    first, second = run_demo(config), run_demo(config)
    assert first.adapter == Path("mlx_dora_demo/adapter")
    assert second.adapter == Path("mlx_dora_demo-2/adapter")
    assert first.training.val_loss == second.training.val_loss


def test_changes_are_those_of_the_dense_rows(
    roomy_folder: Path, tmp_path: Path
) -> None:
    run_demo(DemoConfig(model=str(roomy_folder), output=tmp_path / "demo", iters=3))
    model, _ = load(roomy_folder, tmp_path / "demo/adapter")
    changes = matrix_changes(model)
    assert [change.delta_d for change in changes] == sorted(
        (change.delta_d for change in changes), reverse=True
    )
    layers = dict(dora_layers(model))
    assert len(changes) == len(layers) > 0
    for change in changes:
        layer = layers[change.path]
        before = to_numpy(layer.base["weight"])
        a, b, m = (to_numpy(layer[name]) for name in ("lora_a", "lora_b", "m"))
        turned = before + layer.scale * (a @ b).T
        length = np.linalg.norm(before, axis=1)
        cosine = (before * turned).sum(1) / length / np.linalg.norm(turned, axis=1)
        assert change.delta_m == pytest.approx(np.abs(m - length).mean(), rel=1e-2)
        assert change.delta_d == pytest.approx((1 - cosine).mean(), rel=1e-2)
        assert change.delta_m_relative == pytest.approx(change.delta_m / length.mean())


@pytest.mark.parametrize("values", [{"iters": 0}, {"seed": -1}, {"iters": 1.5}])
def test_a_bad_setting_is_named(values: dict) -> None:
    with pytest.raises(DoRAError, match=next(iter(values))):
        DemoConfig(**values)


@pytest.mark.real_model
@pytest.mark.slow
def test_the_validation_loss_falls_by_a_sixth(tmp_path: Path) -> None:
    report = run_demo(DemoConfig(output=tmp_path / "demo")).training
    mx.clear_cache()
    assert report.first_val_loss is not None and report.val_loss is not None
    assert report.val_loss < 0.85 * report.first_val_loss
