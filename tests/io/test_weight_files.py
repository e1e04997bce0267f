"""Stray weights beside indexed shards: every reader follows the index."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import load, load_lazily, use_in_mlx_lm
from mlx_dora.analyze import analyze_finetune
from mlx_dora.errors import DoRAError
from mlx_dora.fuse.model import fuse_model
from mlx_dora.io.checkpoint import Checkpoint, ShardWriter
from mlx_dora.io.weight_files import weight_files, without_strays
from mlx_dora.merge import merge_models
from tests.adapters.training import TOKENS, train
from tests.checks import assert_close, to_numpy

MakeFolder = Callable[..., Path]


@pytest.fixture
def folders(make_tiny_folder: MakeFolder, tmp_path: Path) -> tuple[Path, Path]:
    """Return a model in shards, and a copy with another model's file beside them."""
    base, other = make_tiny_folder("base"), make_tiny_folder("other", seed=9)
    single = Checkpoint(base)
    tensors = {name: single.tensor(name) for name in single.names}
    mx.eval(tensors)
    (base / "model.safetensors").unlink()
    with ShardWriter(base, max_shard_bytes=40_000) as writer:
        for name, value in tensors.items():
            writer.add(name, value)
    assert len(weight_files(base)) > 1
    both = Path(shutil.copytree(base, tmp_path / "both"))
    shutil.copy(other / "model.safetensors", both / "model.safetensors")
    return base, both


def test_every_reader_follows_the_index__mlx_vlm_1329(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, both = folders
    expected = to_numpy(mlx_lm.load(str(base))[0](TOKENS))
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        assert_close(load(both)[0](TOKENS), expected)
    assert "index.json does not list it: model.safetensors." in caplog.text
    # Tensors are read on first use, after loading has finished.
    assert_close(load_lazily(both)(TOKENS), expected)
    with use_in_mlx_lm():
        assert_close(mlx_lm.load(str(both))[0](TOKENS), expected)

    shards, whole = Checkpoint(base), Checkpoint(both)
    assert whole.names == shards.names
    for name in shards.names:
        assert mx.array_equal(whole.tensor(name), shards.tensor(name))
    analysis = analyze_finetune(base, both)
    assert {layer.delta_d for layer in analysis.layers} <= {0.0}

    model, _ = load(base)
    adapted = to_numpy(train(model))
    save_adapter(model, tmp_path / "a")
    fuse_model(both, tmp_path / "a", tmp_path / "fused")
    assert_close(load(tmp_path / "fused")[0](TOKENS), adapted)

    merge_models([base, both], save_path=tmp_path / "merged", method="linear")
    assert_close(load(tmp_path / "merged")[0](TOKENS), expected)


def test_index_without_its_files_is_not_used(
    make_tiny_folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_folder("base")
    expected = to_numpy(load(folder)[0](TOKENS))
    content = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    assert_close(load(folder)[0](TOKENS), expected)
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        assert "model.norm.weight" in Checkpoint(folder).names
    assert "is ignored: it lists no file of this folder" in caplog.text


def test_damaged_index_is_refused(make_tiny_folder: MakeFolder) -> None:
    folder = make_tiny_folder("base")
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(DoRAError, match=r"index.json is not JSON"):
        load(folder)


def test_folder_without_strays_is_used_directly(make_tiny_folder: MakeFolder) -> None:
    folder = make_tiny_folder("base")
    with without_strays(folder) as seen:
        assert seen == folder
