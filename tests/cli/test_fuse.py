import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_dora.adapters.adapter import BaseModel
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.cli.fuse import command
from tests.adapters.training import train

MakeFolder = Callable[..., Path]


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])


@pytest.fixture
def make_trained(make_tiny_folder: MakeFolder, tmp_path: Path) -> Callable[..., Path]:
    def make(**kw: object) -> Path:
        base = make_tiny_folder("base", **kw)
        model, _ = load(base)
        train(model)
        save_adapter(model, tmp_path / "adapter")
        return tmp_path

    return make


def test_fuses_and_reports(make_trained: Callable[..., Path]) -> None:
    at = make_trained(bits=4)
    inputs = ("--model", at / "base", "--adapter-path", at / "adapter")
    result = run(*inputs, "--save-path", at / "out", "--keep", "0.999")
    assert result.exit_code == 0, result.output
    assert "Fused 4 layers (float32): " in result.stdout
    assert "Packed with the base's own bits it would be " in result.stdout
    assert load(at / "out")[0].layers
    result = run(*inputs, "--save-path", at / "dense", "--dequantize")
    assert result.exit_code == 0, result.output
    assert " bits, " not in result.stdout


def test_verify_exits_with_3_outside_the_tolerance(
    make_trained: Callable[..., Path],
) -> None:
    at = make_trained(bits=4)
    inputs = ("--model", at / "base", "--adapter-path", at / "adapter", "--verify")
    good = run(*inputs, "--save-path", at / "good", "--mode", "lossless")
    assert good.exit_code == 0, good.output
    assert "Fused against unfused on 5 prompts" in good.stdout
    bad = run(
        *inputs, "--save-path", at / "bad", "--keep", "0",
        "--prompt", "the fox", "--max-logit-difference", "1e-6",
    )  # fmt: skip
    assert bad.exit_code == 3, bad.output
    assert "Fused against unfused on 1 prompt " in bad.stdout
    assert bad.stderr.splitlines()[-1].startswith("Error: not verified: logits differ")


def test_refusals_are_one_line(
    make_trained: Callable[..., Path], make_tiny_folder: MakeFolder
) -> None:
    at = make_trained()
    other = make_tiny_folder("other", seed=2)
    (at / "there").mkdir()
    (at / "empty").mkdir()
    cases = [
        (at / "none", at / "adapter", at / "out", "there is no model folder"),
        (at / "base", at / "none", at / "out", "there is no such folder"),
        (at / "base", at / "empty", at / "out", "it has no adapter_config.json"),
        (other, at / "adapter", at / "out", "whose tensors differ from this model"),
        (at / "base", at / "adapter", at / "there", "already exists"),
    ]
    for model, adapter, out, message in cases:
        result = run("--model", model, "--adapter-path", adapter, "--save-path", out)
        assert result.exit_code == 1
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (at / "out").exists()
    result = run(
        "--model", other, "--adapter-path", at / "adapter", "--save-path", at / "out",
        "--no-check-base",
    )  # fmt: skip
    assert result.exit_code == 0, result.output


def test_usage_error_exits_with_2() -> None:
    assert run("--nonsense").exit_code == 2


def test_the_base_recorded_by_the_adapter_is_used(
    make_trained: Callable[..., Path],
) -> None:
    at = make_trained()
    model, _ = load(at / "base", at / "adapter")
    save_adapter(model, at / "with-base", base_model=str(at / "base"))
    named = run("--adapter-path", at / "with-base", "--save-path", at / "out")
    assert named.exit_code == 0, named.output
    assert named.stderr == f"Base: {at / 'base'}, as recorded by the adapter.\n"
    nameless = replace(load_adapter(at / "adapter"), base=BaseModel())
    save_adapter(nameless, at / "nameless")
    silent = run("--adapter-path", at / "nameless", "--save-path", at / "out2")
    assert silent.exit_code == 1
    assert "does not say what its base is; give the model (--model)" in silent.stderr


def test_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mlx_dora", "fuse", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--adapter-path" in result.stdout
