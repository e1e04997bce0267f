import json
import logging
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import load, load_with_config
from mlx_dora.adapters.surgery import adapter_layers, apply_dora, dora_layers
from mlx_dora.errors import DoRAError
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.model import fuse_dora, fuse_model, save_fused
from mlx_dora.io.header import read_header
from tests.adapters.folders import names
from tests.adapters.training import QV, TOKENS, perturb, train
from tests.checks import BOUNDS, assert_close, to_numpy

Make = Callable[..., nn.Module]
MakeFolder = Callable[..., Path]
WITH_HEAD = DoRAConfig(num_layers=2, keys=(*QV, "model.embed_tokens"))


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_dense_fuse_keeps_dtype_and_size(
    make_tiny_model: Make, dtype: mx.Dtype
) -> None:
    model = make_tiny_model(dtype=dtype)
    before = parameters(model)
    expected = train(model, WITH_HEAD)
    report = fuse_dora(model)
    after = parameters(model)
    assert adapter_layers(model) == []
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
        k: (v.shape, v.dtype) for k, v in before.items()
    }
    assert report.bytes_after == report.bytes_before
    assert {layer.dtype for layer in report.layers} == {str(dtype).split(".")[-1]}
    assert report.layers[0].path == "model.embed_tokens"
    assert report.total.kept == pytest.approx(1, abs=BOUNDS[dtype])
    assert report.total.cosine > 1 - 10 * BOUNDS[dtype]
    assert_close(model(TOKENS), to_numpy(expected), bound=2 * BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_dense_fuse_rounds_once(make_tiny_model: Make, dtype: mx.Dtype) -> None:
    model = make_tiny_model(dtype=dtype)
    train(model)
    path, layer = dora_layers(model)[0]
    w, a, b, m = (
        to_numpy(v) for v in (layer.base["weight"], layer.lora_a, layer.lora_b, layer.m)
    )
    adapted = w + layer.scale * b.T @ a.T
    exact = m[:, None] * adapted / np.linalg.norm(adapted, axis=1, keepdims=True)
    fuse_dora(model)
    fused = parameters(model)[f"{path}.weight"]
    once = mx.array(exact.astype(np.float32)).astype(dtype)
    # float32 arithmetic before rounding can change the direction of a tie.
    assert np.mean(to_numpy(fused) == to_numpy(once)) > 0.995


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_untrained_adapter_changes_no_bit(
    make_tiny_model: Make, dtype: mx.Dtype, bits: int | None
) -> None:
    model = make_tiny_model(dtype=dtype, bits=bits)
    before = parameters(model)
    apply_dora(model, WITH_HEAD)
    report = fuse_dora(model)
    after = parameters(model)
    assert before.keys() == after.keys()
    assert all(mx.array_equal(after[name], before[name]) for name in before)
    assert {layer.kept for layer in report.layers} == {1.0}
    assert report.lossy == ()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_report_says_what_survives_packing(
    make_tiny_model: Make, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny_model(bits=bits)
    train(model)
    _, layer = dora_layers(model)[0]
    base = layer.fuse(dequantize=True)
    weight = layer.base
    w0 = to_numpy(
        mx.dequantize(weight["weight"], weight["scales"], weight["biases"], 32, bits)
    )
    packed = layer.fuse()
    w1 = to_numpy(
        mx.dequantize(packed["weight"], packed["scales"], packed["biases"], 32, bits)
    )
    exact = to_numpy(base["weight"]) - w0
    kept = (exact * (w1 - w0)).sum() / (exact**2).sum()
    cosine = kept * np.linalg.norm(exact) / np.linalg.norm(w1 - w0)
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        report = fuse_dora(model)
    first = report.layers[0]
    assert first.kept == pytest.approx(kept, abs=1e-4)
    assert first.cosine == pytest.approx(cosine, abs=1e-4)
    assert first.bits == bits
    assert ("repacking lost" in caplog.text) == bool(report.lossy)


def test_small_update_lost_in_packing_is_reported(
    make_tiny_model: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny_model(bits=4)
    apply_dora(model, DoRAConfig(num_layers=1, keys=QV))
    perturb(model, 0.0005)
    for _, layer in dora_layers(model):
        layer.m = layer.norm()
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        report = fuse_dora(model)
    assert len(report.lossy) == 2
    assert "lost part of the update in 2 of 2 layers" in caplog.text


def test_dequantize_makes_the_whole_model_dense(make_tiny_model: Make) -> None:
    model = make_tiny_model(bits=4)
    expected = train(model)
    report = fuse_dora(model, dequantize=True)
    assert not any("scales" in module for module in model.modules())
    assert {layer.bits for layer in report.layers} == {None}
    assert report.bytes_after > report.bytes_before
    assert_close(model(TOKENS), to_numpy(expected))


def test_model_without_dora_is_refused(make_tiny_model: Make) -> None:
    with pytest.raises(DoRAError, match="no DoRA layers to fuse"):
        fuse_dora(make_tiny_model())
    model = make_tiny_model()
    train(model, kind="lora")
    with pytest.raises(DoRAError, match=r"4 adapter layers of mlx-lm; .* mlx_lm.fuse"):
        fuse_dora(model)


@pytest.fixture
def trained(make_tiny_folder: MakeFolder, tmp_path: Path) -> tuple[Path, Path]:
    folder = make_tiny_folder("base", dtype=mx.bfloat16)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    model, _ = load(folder)
    train(model, WITH_HEAD)
    save_adapter(model, tmp_path / "adapter")
    return folder, tmp_path / "adapter"


def test_fused_folder_is_a_model(trained: tuple[Path, Path], tmp_path: Path) -> None:
    import mlx_lm

    base, adapter = trained
    fuse_model(base, adapter, tmp_path / "fused")
    assert names(tmp_path) == ["adapter", "base", "fused"]
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(
        names(tmp_path / "fused")
    )
    fused, tokenizer = mlx_lm.load(str(tmp_path / "fused"))[:2]
    expected = load(base, adapter)[0](TOKENS)
    assert fused(TOKENS).dtype == mx.bfloat16
    assert_close(fused(TOKENS), to_numpy(expected), bound=2 * BOUNDS[mx.bfloat16])
    kept, made = (
        {
            name: (info.dtype, info.shape)
            for name, info in read_header(folder / "model.safetensors").items()
        }
        for folder in (base, tmp_path / "fused")
    )
    assert made == kept
    assert tokenizer.has_chat_template


def test_shards_load(trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokenizer, config = load_with_config(*trained)
    fuse_dora(model)
    save_fused(
        model, tokenizer, trained[0], tmp_path / "f", config=config,
        max_shard_bytes=20_000,
    )  # fmt: skip
    assert len(list((tmp_path / "f").glob("model-*-of-*.safetensors"))) > 1
    again, _ = load(tmp_path / "f")
    assert mx.array_equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize("dequantize", [True, False])
def test_config_says_whether_it_is_packed(
    make_tiny_folder: MakeFolder, tmp_path: Path, dequantize: bool
) -> None:
    base = make_tiny_folder("base", bits=8)
    config = FuseConfig(mode="dequantize" if dequantize else "requantize", keep=0)
    model, _ = load(base)
    expected = train(model)
    save_adapter(model, tmp_path / "a")
    fuse_model(base, tmp_path / "a", tmp_path / "f", config=config)
    content = json.loads((tmp_path / "f" / "config.json").read_text())
    assert ("quantization" in content) != dequantize
    assert ("quantization_config" in content) != dequantize
    fused, _ = load(tmp_path / "f")
    bound = 1e-5 if dequantize else 0.05  # 8 bits add noise
    assert_close(fused(TOKENS), to_numpy(expected), bound=bound)


def test_existing_output_is_refused_before_any_work(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "mine").touch()
    with pytest.raises(DoRAError, match="already exists"):
        fuse_model("/no/such/model", trained[1], tmp_path / "f")
    with pytest.raises(DoRAError, match="is not an output of mlx_dora"):
        fuse_model("/no/such/model", trained[1], tmp_path / "f", overwrite=True)
    assert (tmp_path / "f" / "mine").exists()
    (tmp_path / "f" / "mine").unlink()
    fuse_model(*trained, tmp_path / "f", overwrite=True)
    (tmp_path / "f" / "config.json").write_text("old")
    fuse_model(*trained, tmp_path / "f", overwrite=True)
    assert (tmp_path / "f" / "config.json").read_text() != "old"


def test_inputs_are_never_overwritten(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    for target in trained:
        before = names(target)
        with pytest.raises(DoRAError, match="is the input"):
            fuse_model(*trained, target, overwrite=True)
        assert names(target) == before


def test_failure_leaves_nothing(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(TokenizerWrapper, "save_pretrained", fail, raising=False)
    with pytest.raises(OSError, match="disk full"):
        fuse_model(*trained, tmp_path / "f")
    assert names(tmp_path) == ["adapter", "base"]


def test_adapted_model_is_not_saved_as_fused(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    model, tokenizer = load(*trained)
    perturb(model)
    with pytest.raises(DoRAError, match=r"model.embed_tokens is still adapted"):
        save_fused(model, tokenizer, trained[0], tmp_path / "f")
