from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.fused import verify_fused
from mlx_dora.evaluate.tolerance import FuseTolerance
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.model import fuse_model
from tests.adapters.training import QV, train
from tests.checks import to_numpy

Folders = tuple[Path, Path]
TEXT = ("the quick brown fox", "What does")


@pytest.fixture
def trained(make_tiny_folder: Callable[..., Path], tmp_path: Path) -> Folders:
    base = make_tiny_folder("base", bits=4)
    model, _ = load(base)
    train(model, DoRAConfig(num_layers=2, keys=QV))
    save_adapter(model, tmp_path / "adapter")
    return base, tmp_path / "adapter"


@pytest.mark.parametrize("mode", ["lossless", "dequantize"])
def test_a_good_fuse_is_verified(trained: Folders, tmp_path: Path, mode: str) -> None:
    config = FuseConfig(mode=mode)  # pyright: ignore[reportArgumentType]
    fuse_model(*trained, tmp_path / "f", config=config)
    result = verify_fused(*trained, tmp_path / "f", prompts=TEXT, max_tokens=8)
    assert result.problems == []
    assert result.prompts == 2
    assert result.agreement.relative_logit_difference < 1e-5
    assert result.agreement.same_top_token == 1
    assert "greedy tokens the same at 100.0%" in result.line()


def test_each_difference_is_named(trained: Folders, tmp_path: Path) -> None:
    fuse_model(*trained, tmp_path / "f", config=FuseConfig(keep=0))
    strict = FuseTolerance(
        max_logit_difference=0, max_loss_difference=0, min_same_tokens=1
    )
    result = verify_fused(
        *trained, tmp_path / "f", prompts=TEXT, max_tokens=8, tolerance=strict
    )
    assert any("logits differ by" in problem for problem in result.problems)
    assert any("loss differs by" in problem for problem in result.problems)


def test_figures_are_those_of_the_two_models(trained: Folders, tmp_path: Path) -> None:
    fuse_model(*trained, tmp_path / "f", config=FuseConfig(keep=0))
    result = verify_fused(*trained, tmp_path / "f", prompts=TEXT[:1], max_tokens=1)
    unfused, tokenizer = load(*trained)
    fused, _ = load(tmp_path / "f")
    tokens = mx.array([tokenizer.encode(TEXT[0])])
    mine, other = (to_numpy(model(tokens)) for model in (unfused, fused))
    difference = ((other - mine) ** 2).mean() ** 0.5 / (mine**2).mean() ** 0.5
    assert result.agreement.relative_logit_difference == pytest.approx(difference, 1e-4)
    same = (mine.argmax(-1) == other.argmax(-1)).mean()
    assert result.agreement.same_top_token == pytest.approx(same)


def test_a_broken_model_is_a_problem(trained: Folders, tmp_path: Path) -> None:
    fuse_model(*trained, tmp_path / "f", config=FuseConfig(mode="dequantize"))
    weights = mx.load(str(tmp_path / "f" / "model.safetensors"))
    assert isinstance(weights, dict)
    name = "model.norm.weight"
    mx.eval(weights)
    weights[name] = mx.full(weights[name].shape, mx.nan)
    mx.save_safetensors(str(tmp_path / "f" / "model.safetensors"), weights)
    result = verify_fused(*trained, tmp_path / "f", prompts=TEXT, max_tokens=2)
    assert len(result.problems) >= 2


def test_no_prompts_and_no_tokens_are_refused(trained: Folders) -> None:
    with pytest.raises(DoRAError, match="prompts must hold at least one prompt"):
        verify_fused(*trained, trained[0], prompts=())
    with pytest.raises(DoRAError, match="max_tokens must be at least 1, got 0"):
        verify_fused(*trained, trained[0], max_tokens=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_logit_difference", -1.0),
        ("max_loss_difference", float("nan")),
        ("min_same_tokens", 1.5),
    ],
)
def test_bad_tolerances_are_refused(name: str, value: float) -> None:
    with pytest.raises(DoRAError, match=name):
        FuseTolerance(**{name: value})
