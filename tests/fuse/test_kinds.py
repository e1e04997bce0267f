"""LoRA adapters and full fine-tuning are fused like DoRA adapters."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora.adapters.adapter import BaseModel, take_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.recorded_base import recorded_base
from mlx_dora.errors import DoRAError
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.model import fuse_model
from tests.adapters.folders import edit_config
from tests.adapters.training import QV, TOKENS, train
from tests.checks import BOUNDS, assert_close, to_numpy

MakeFolder = Callable[..., Path]
WITH_HEAD = DoRAConfig(num_layers=2, keys=(*QV, "model.embed_tokens"), scale=3.0)
Q0 = "model.layers.0.self_attn.q_proj"


def tensors(folder: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(folder / "model.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


def save_lora(base: Path, adapter: Path, config: DoRAConfig = WITH_HEAD) -> None:
    model, _ = load(base)
    train(model, config, "lora")
    save_adapter(model, adapter, base_model=str(base))


def save_full(base: Path, adapter: Path) -> None:
    """Move every parameter of the last block that is not packed by a few percent."""
    model, _ = load(base)
    before = BaseModel(fingerprint=fingerprint(model))
    model.freeze()  # as in mlx-lm, which accepts packed weights
    cast(Any, model).layers[-1].unfreeze()
    for module in model.modules():
        if "scales" in module:
            module.freeze()
    mx.random.seed(5)
    flat = cast(list[tuple[str, mx.array]], tree_flatten(model.trainable_parameters()))
    moved = [
        (name, value * (1 + 0.1 * mx.random.normal(value.shape).astype(value.dtype)))
        for name, value in flat
    ]
    model.load_weights(moved, strict=False)
    full = take_adapter(model, fine_tune_type="full", base=before)
    save_adapter(full, adapter, base_model=str(base))


def exact_lora(base: np.ndarray, adapter: Path, path: str) -> np.ndarray:
    """Return W0 + s·BA in float64."""
    parts = load_adapter(adapter).tensors
    a = to_numpy(parts[f"{path}.lora_a"]).astype(np.float64)
    b = to_numpy(parts[f"{path}.lora_b"]).astype(np.float64)
    update = a @ b if path.endswith("embed_tokens") else b.T @ a.T
    return base.astype(np.float64) + WITH_HEAD.scale * update


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_fused_lora_is_base_plus_update__mlx_lm_lora_31(
    make_tiny_folder: MakeFolder, tmp_path: Path, dtype: mx.Dtype
) -> None:
    base = make_tiny_folder("base", dtype=dtype)
    save_lora(base, tmp_path / "a")
    report = fuse_model(base, tmp_path / "a", tmp_path / "f")
    before, after = tensors(base), tensors(tmp_path / "f")
    assert before.keys() == after.keys()
    adapted = load_adapter(tmp_path / "a").paths
    assert len(adapted) == 5
    for path in adapted:
        name = f"{path}.weight"
        exact = exact_lora(to_numpy(before[name]), tmp_path / "a", path)
        assert after[name].dtype == dtype
        assert_close(after[name], exact.astype(np.float32), bound=BOUNDS[dtype])
    for name in before.keys() - {f"{path}.weight" for path in adapted}:
        assert mx.array_equal(before[name], after[name])
    assert [layer.path for layer in report.layers] == [
        "model.embed_tokens", *adapted[1:]
    ]  # fmt: skip
    assert report.total.kept == pytest.approx(1, abs=BOUNDS[dtype])
    stock = mlx_lm.load(str(base), adapter_path=str(tmp_path / "a"))[0](TOKENS)
    fused = mlx_lm.load(str(tmp_path / "f"))[0](TOKENS)
    assert_close(fused, to_numpy(stock), bound=3 * BOUNDS[dtype])


@pytest.mark.parametrize("mode", ["requantize", "dequantize"])
def test_lora_is_fused_into_a_packed_base(
    make_tiny_folder: MakeFolder, tmp_path: Path, mode: str
) -> None:
    base = make_tiny_folder("base", bits=4)
    config = DoRAConfig(num_layers=2, keys=QV, scale=WITH_HEAD.scale)
    save_lora(base, tmp_path / "a", config)
    settings = FuseConfig(mode=mode, keep=0.95)  # pyright: ignore[reportArgumentType]
    report = fuse_model(base, tmp_path / "a", tmp_path / "f", config=settings)
    packed = tensors(base)
    unpacked = to_numpy(
        mx.dequantize(*(packed[f"{Q0}.{n}"] for n in ("weight", "scales", "biases")),
                      group_size=32, bits=4)
    )  # fmt: skip
    exact = exact_lora(unpacked, tmp_path / "a", Q0)
    model, _ = mlx_lm.load(str(tmp_path / "f"))[:2]
    module = dict(model.named_modules())[Q0]
    made = module["weight"]
    if "scales" in module:
        made = mx.dequantize(
            made, module["scales"], module["biases"], module.group_size, module.bits
        )
    due, done = exact - unpacked, to_numpy(made) - unpacked
    kept = (due * done).sum() / (due * due).sum()
    first = next(layer for layer in report.layers if layer.path == Q0)
    assert first.kept == pytest.approx(kept, abs=1e-4)
    assert kept > 0.95
    if mode == "dequantize":
        assert_close(made, exact.astype(np.float32))


def test_lossless_fuse_of_lora_is_refused(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    base = make_tiny_folder("base", bits=4)
    save_lora(base, tmp_path / "a")
    with pytest.raises(DoRAError, match="has no magnitudes"):
        fuse_model(
            base, tmp_path / "a", tmp_path / "f", config=FuseConfig(mode="lossless")
        )
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("mode", ["requantize", "dequantize"])
def test_full_fine_tuning_is_fused__mlx_lm_lora_31(
    make_tiny_folder: MakeFolder, tmp_path: Path, bits: int | None, mode: str
) -> None:
    base = make_tiny_folder("base", bits=bits)
    save_full(base, tmp_path / "a")
    trained = load_adapter(tmp_path / "a").tensors
    assert all(name.startswith("model.layers.1.") for name in trained)
    settings = FuseConfig(mode=mode)  # pyright: ignore[reportArgumentType]
    report = fuse_model(base, tmp_path / "a", tmp_path / "f", config=settings)
    made = tensors(tmp_path / "f")
    assert all(mx.array_equal(made[name], value) for name, value in trained.items())
    assert {layer.path for layer in report.layers} == trained.keys()
    assert report.total.kept == pytest.approx(1)
    stock = mlx_lm.load(str(base), adapter_path=str(tmp_path / "a"))[0](TOKENS)
    fused = mlx_lm.load(str(tmp_path / "f"))[0](TOKENS)
    assert_close(fused, to_numpy(stock))
    base_logits = mlx_lm.load(str(base))[0](TOKENS)
    assert np.abs(to_numpy(fused) - to_numpy(base_logits)).max() > 1e-3


def test_full_fine_tuning_takes_the_dtype_of_the_base(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    base = make_tiny_folder("base", dtype=mx.bfloat16)
    save_full(base, tmp_path / "a")
    path = str(tmp_path / "a" / "adapters.safetensors")
    trained = {k: v.astype(mx.float32) * 1.0001 for k, v in mx.load(path).items()}  # pyright: ignore[reportAttributeAccessIssue]
    mx.eval(trained)
    mx.save_safetensors(path, trained)
    report = fuse_model(base, tmp_path / "a", tmp_path / "f")
    made = tensors(tmp_path / "f")
    assert {value.dtype for value in made.values()} == {mx.bfloat16}
    for name, value in trained.items():
        assert mx.array_equal(made[name], value.astype(mx.bfloat16))
    before = tensors(base)
    due = np.concatenate(
        [(to_numpy(v) - to_numpy(before[n])).ravel() for n, v in trained.items()]
    )
    done = np.concatenate(
        [(to_numpy(made[n]) - to_numpy(before[n])).ravel() for n in trained]
    )
    assert report.total.kept == pytest.approx(due @ done / (due @ due), abs=1e-5)


def test_fuse_reads_the_base_from_the_adapter(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    base = make_tiny_folder("base")
    save_lora(base, tmp_path / "a")
    fuse_model(None, tmp_path / "a", tmp_path / "found")
    fuse_model(base, tmp_path / "a", tmp_path / "given")
    result, given = tensors(tmp_path / "found"), tensors(tmp_path / "given")
    assert all(mx.array_equal(result[name], given[name]) for name in given)


def test_adapter_without_a_base_says_so(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    base = make_tiny_folder("base")
    model, _ = load(base)
    train(model)
    save_adapter(replace(take_adapter(model), base=BaseModel()), tmp_path / "a")
    with pytest.raises(DoRAError, match="does not say what its base is; give the mod"):
        recorded_base(tmp_path / "a")
    content = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    gone = {**content["mlx_dora"]["base"], "model": "/no/such/model"}
    edit_config(tmp_path / "a", mlx_dora={**content["mlx_dora"], "base": gone})
    with pytest.raises(DoRAError, match="trained on /no/such/model, which is not the"):
        recorded_base(tmp_path / "a")
