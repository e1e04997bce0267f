"""Extracts adapters from fine-tuned models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_dora import DoRAConfig, DoRAError, save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.origins import Origins
from mlx_dora.cli.extract import command
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.model import fuse_model
from mlx_dora.merge.adapters.extract import extract_adapter
from mlx_dora.merge.adapters.factor import factor, row_norm
from tests.adapters.training import QV, TOKENS, train
from tests.checks import assert_close, to_numpy

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_tuned(make_tiny_folder: MakeFolder, tmp_path: Path):
    """A base and a model fine-tuned by a DoRA adapter of rank 3, fused."""

    def make(bits: int | None = None, **kw) -> tuple[Path, Path, mx.array]:
        base = make_tiny_folder("base", bits=bits, **kw)
        model, _ = load(base)
        logits = train(model, DoRAConfig(rank=3, scale=2.0, num_layers=2, keys=QV))
        save_adapter(model, tmp_path / "adapter")
        config = FuseConfig(mode="dequantize" if bits else "requantize")
        fuse_model(base, tmp_path / "adapter", tmp_path / "tuned", config=config)
        return base, tmp_path / "tuned", logits

    return make


def test_a_fused_adapter_comes_out_again(make_tuned, tmp_path: Path) -> None:
    base, tuned, logits = make_tuned()
    result = extract_adapter(base, tuned, rank=3, save_path=tmp_path / "out")
    assert [layer.path for layer in result.layers] == [
        f"model.layers.{i}.{key}" for i in (0, 1) for key in QV
    ]
    assert result.left_out == ()
    assert max(layer.error for layer in result.layers) < 1e-3
    model, _ = load(base, tmp_path / "out")
    assert_close(model(TOKENS), to_numpy(logits), bound=1e-3)


@pytest.mark.parametrize("bits", [None, 4])
def test_full_rank_loses_nothing(make_tuned, bits: int | None) -> None:
    base, tuned, _ = make_tuned(bits=bits)
    result = extract_adapter(base, tuned, energy=1.0)
    assert max(layer.error for layer in result.layers) < 1e-4


def test_magnitudes_are_exact_at_any_rank(make_tuned) -> None:
    base, tuned, _ = make_tuned()
    result = extract_adapter(base, tuned, rank=1)
    path = "model.layers.0.self_attn.q_proj"
    weight = dict(load(tuned)[0].named_modules())[path].weight
    norms = np.linalg.norm(to_numpy(weight), axis=1)
    assert_close(result.adapter.tensors[f"{path}.m"], norms, bound=1e-7)
    assert result.layers[0].error > 0.1


def test_the_error_is_minimal_for_the_rank() -> None:
    """If rows keep their length, the truncated SVD of the change is optimal."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((20, 30))
    change = 1e-3 * rng.standard_normal((20, 30))
    change -= (change * base).sum(1)[:, None] * base / (base**2).sum(1)[:, None]
    goal = mx.array((base + change).astype(np.float32))
    made = factor(
        mx.array(base.astype(np.float32)), goal, row_norm(goal), scale=2.0, rank=5
    )
    sizes = np.linalg.svd(change, compute_uv=False)
    best = (sizes[5:] ** 2).sum() / (sizes**2).sum()
    assert made.discarded == pytest.approx(best, rel=0.05)
    assert made.discarded <= best * (1 + 1e-4)


@pytest.mark.parametrize("bits", [None, 4])
def test_energy_chooses_ranks_and_a_rank_is_kept(make_tuned, bits: int | None) -> None:
    base, tuned, _ = make_tuned(bits=bits)
    result = extract_adapter(base, tuned, energy=0.6)
    assert all(layer.rank < 4 and layer.discarded <= 0.4 for layer in result.layers)
    for layer in result.layers:
        assert f"{layer.path}: rank {layer.rank}, " in "\n".join(result.details())
        assert 0 < layer.error < 1
    fixed = extract_adapter(base, tuned, rank=3)
    assert {layer.rank for layer in fixed.layers} == {3}
    # The rounding of packing is not low-rank: on a packed base the error shows it.
    assert max(layer.error for layer in fixed.layers) < 1e-3
    capped = extract_adapter(base, tuned, energy=1.0, rank=2)
    assert {layer.rank for layer in capped.layers} == {2}


@pytest.mark.parametrize("in_files", [True, False])
def test_uncovered_tensors_are_named(
    make_tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_files: bool
) -> None:
    """Compared in their files or, if the model changed them on loading, in memory."""
    if not in_files:
        monkeypatch.setattr(Origins, "stored", lambda *_: None)
    monkeypatch.setattr("mlx_dora.io.stored._COMPARED", 100)
    base, tuned, _ = make_tuned()
    result = extract_adapter(base, tuned, rank=2, keys=["self_attn.q_proj"])
    names = [f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)]
    assert list(result.left_out) == names


def test_weights_leave_the_memory_after_use(
    make_tiny_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The covered matrices are 25 MB; a few are held at a time."""
    monkeypatch.setattr("mlx_dora.merge.adapters.nearest.LARGE", 64)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    base, tuned = (
        make_tiny_folder(f"m{s}", seed=s, num_key_value_heads=4, **sizes)
        for s in (1, 2)
    )
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    keys = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    extract_adapter(base, tuned, rank=2, keys=keys)
    assert mx.get_peak_memory() - before < 12e6


def test_refusals(make_tuned, tmp_path: Path) -> None:
    base, tuned, _ = make_tuned()
    (tmp_path / "there").mkdir()
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "give rank, energy"),
        ({"rank": 0}, "rank must be"),
        ({"energy": 1.5}, "energy must be"),
        ({"rank": 2, "keys": ["q_pro"]}, "no module is called 'q_pro'"),
        ({"rank": 2, "save_path": tmp_path / "there"}, "already exists"),
        ({"rank": 2, "save_path": tmp_path / "tuned"}, "tuned is the input"),
    ]
    for kw, message in cases:
        with pytest.raises(DoRAError, match=message):
            extract_adapter(base, tuned, **kw)
    with pytest.raises(DoRAError, match="does not differ"):
        extract_adapter(base, base, rank=2)


def test_the_command(make_tuned, tmp_path: Path) -> None:
    base, tuned, _ = make_tuned()
    args = [str(base), str(tuned), "--save-path", str(tmp_path / "out")]
    result = CliRunner().invoke(command, [*args, "--rank", "3", "-v"])
    assert result.exit_code == 0, result.output
    assert "Extracted 4 matrices: rank 3, error at most " in result.stdout
    assert "q_proj: rank 3, " in result.stderr
    assert load(base, tmp_path / "out")[0].layers
    assert CliRunner().invoke(command, args).exit_code == 2
