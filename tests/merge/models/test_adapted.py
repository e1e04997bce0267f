"""Models with adapters in a merge: ``model+adapter``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import DoRAError
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import apply_dora
from mlx_dora.fuse.model import fuse_model
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.merge import merge_models
from mlx_dora.merge.models import read_mergekit, run_merge
from mlx_dora.peft import to_peft
from tests.adapters.training import perturb
from tests.checks import assert_close, to_numpy


def adapter_of(folder: Path, out: Path, *keys: str) -> Path:
    model, _ = load(folder)
    apply_dora(model, DoRAConfig(num_layers=2, keys=keys, rank=4))
    perturb(model, 0.05)
    save_adapter(model, out)
    return out


def alone(name: str, out: Path) -> Path:
    """A merge of one model, which copies it."""
    entry = {"model": name, "parameters": {"weight": 1.0}}
    run_merge(read_mergekit({"merge_method": "linear", "models": [entry]}), out)
    return out


@pytest.mark.parametrize("is_peft", [False, True])
def test_a_dora_adapter_is_fused_while_it_is_read(
    make_tiny_folder: Callable[..., Path], tmp_path: Path, is_peft: bool
) -> None:
    base = make_tiny_folder("base")
    adapter = adapter_of(base, tmp_path / "adapter", "self_attn.q_proj", "mlp.up_proj")
    fuse_model(base, adapter, tmp_path / "fused")
    if is_peft:
        loaded: Any = load(base)[0]
        to_peft(adapter, tmp_path / "peft", base_model_name_or_path=str(base))
        adapter = tmp_path / "peft"
        assert loaded is not None
    result = Checkpoint(alone(f"{base}+{adapter}", tmp_path / "out"))
    fused, before = Checkpoint(tmp_path / "fused"), Checkpoint(base)
    moved = 0
    for name in fused.names:
        own = to_numpy(fused.tensor(name))
        assert_close(result.tensor(name), own, bound=1e-6)
        moved += not np.array_equal(own, to_numpy(before.tensor(name)))
    assert moved == 4


def test_a_packed_base_is_fused_unpacked_and_packed_again(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_tiny_folder("base", bits=8)
    adapter = adapter_of(base, tmp_path / "adapter", "self_attn.q_proj")
    fuse_model(base, adapter, tmp_path / "fused")
    out = alone(f"{base}+{adapter}", tmp_path / "out")
    models: list[Any] = [load(folder)[0] for folder in (out, tmp_path / "fused")]
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        first, second = (dict(model.named_modules())[path] for model in models)
        x = mx.eye(first.weight.shape[1] * 4)
        assert_close(first(x), to_numpy(second(x)), bound=5e-3)


def test_the_changes_of_an_adapter_are_merged_over_its_own_base(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Base and base+adapter are two models: task arithmetic scales the change."""
    base = make_tiny_folder("base")
    adapter = adapter_of(base, tmp_path / "adapter", "self_attn.q_proj")
    name = "model.layers.0.self_attn.q_proj.weight"
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": f"{base}+{adapter}", "parameters": {"weight": 0.5}}],
    }
    run_merge(read_mergekit(config), tmp_path / "half")
    whole = Checkpoint(alone(f"{base}+{adapter}", tmp_path / "out"))
    start, full = (to_numpy(c.tensor(name)) for c in (Checkpoint(base), whole))
    half = Checkpoint(tmp_path / "half").tensor(name)
    assert np.abs(full - start).max() > 1e-3
    assert_close(half, (start + full) / 2, bound=1e-6)


def test_an_adapter_of_another_base_gets_a_note(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base, other = make_tiny_folder("base"), make_tiny_folder("other", seed=5)
    adapter = adapter_of(other, tmp_path / "adapter", "self_attn.q_proj")
    entry = {"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}
    config = {"merge_method": "linear", "models": [entry]}
    report = run_merge(read_mergekit(config), tmp_path / "out")
    assert any("was trained on another model" in line for line in report.lines())


def test_what_cannot_be_adapted_is_refused(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_tiny_folder("base")
    with pytest.raises(DoRAError, match="not a local adapter folder"):
        alone(f"{base}+{tmp_path / 'none'}", tmp_path / "out")
    adapter = adapter_of(base, tmp_path / "adapter", "model.embed_tokens")
    with pytest.raises(DoRAError, match="embed_tokens is not a linear layer"):
        alone(f"{base}+{adapter}", tmp_path / "out")
    wide = make_tiny_folder("wide", seed=3, hidden_size=64)
    adapter = adapter_of(wide, tmp_path / "two", "self_attn.q_proj")
    with pytest.raises(DoRAError, match=r"base\+.*q_proj.*shape"):
        alone(f"{base}+{adapter}", tmp_path / "out")


def test_a_folder_with_a_plus_in_its_name_is_a_folder(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tiny_folder("base").rename(tmp_path / "one+two")
    merge_models([folder, folder], save_path=tmp_path / "out")
    name = "model.norm.weight"
    own = to_numpy(Checkpoint(folder).tensor(name))
    assert_close(Checkpoint(tmp_path / "out").tensor(name), own, bound=1e-6)
