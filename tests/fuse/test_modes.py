"""Fuses packed layers in each mode."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import apply_dora, dora_layers
from mlx_dora.errors import DoRAError
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.model import REST_NAME, fuse_dora, fuse_model
from tests.adapters.training import QV, TOKENS, perturb
from tests.checks import assert_close, to_numpy

Q0 = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Trained:
    base: Path
    adapter: Path
    logits: np.ndarray


@pytest.fixture
def make_trained(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> Callable[..., Trained]:
    """Return an adapter of realistic size, which packing to 4 bits mostly loses."""

    def make(
        size: float = 0.0005, spread: float = 0.0015, keys: tuple = QV, **kw: object
    ) -> Trained:
        base = make_tiny_folder("base", **kw)
        model, _ = load(base)
        apply_dora(model, DoRAConfig(num_layers=2, keys=keys, rank=4))
        perturb(model, size)
        for _, layer in dora_layers(model):
            change = spread * mx.random.normal(layer.m.shape)
            layer.m = layer.norm() * (1 + change)
        save_adapter(model, tmp_path / "adapter")
        return Trained(base, tmp_path / "adapter", to_numpy(model(TOKENS)))

    return make


def dense(model: nn.Module, path: str, dtype: mx.Dtype = mx.float32) -> np.ndarray:
    """Return a weight in float64, unpacked in `dtype`."""
    module = dict(model.named_modules())[path]
    if "scales" not in module:
        return to_numpy(module["weight"])
    scales, biases = (module[x].astype(dtype) for x in ("scales", "biases"))
    return to_numpy(
        mx.dequantize(module["weight"], scales, biases, module.group_size, module.bits)
    )


def adapted_weight(trained: Trained, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return W0 and W' of a layer in float64, with norms in the base's dtype."""
    adapter = load_adapter(trained.adapter)
    model = load(trained.base)[0]
    w0 = dense(model, path)
    a, b, m = (
        to_numpy(adapter.tensors[f"{path}.{x}"]) for x in ("lora_a", "lora_b", "m")
    )
    delta = adapter.config.scale * b.T @ a.T
    own = dict(model.named_modules())[path]["scales"].dtype
    norm = np.linalg.norm(dense(model, path, own) + delta, axis=1, keepdims=True)
    return w0, m[:, None] * (w0 + delta) / norm


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_lossless_changes_no_packed_value_and_loses_nothing(
    make_trained: Callable[..., Trained], tmp_path: Path, bits: int
) -> None:
    trained = make_trained(bits=bits)
    report = fuse_model(
        trained.base, trained.adapter, tmp_path / "f",
        config=FuseConfig(mode="lossless"),
    )  # fmt: skip
    assert report.total.kept == pytest.approx(1, abs=1e-4)
    assert min(layer.cosine for layer in report.layers) > 0.9999
    stock, _ = mlx_lm.load(
        str(tmp_path / "f"), adapter_path=str(tmp_path / "f" / REST_NAME)
    )[:2]
    assert_close(stock(TOKENS), trained.logits, bound=1e-5)
    ours, _ = load(tmp_path / "f", tmp_path / "f" / REST_NAME)
    assert_close(ours(TOKENS), trained.logits, bound=1e-5)
    before, _ = load(trained.base)
    after, _ = load(tmp_path / "f")
    pairs = [dict(model.named_modules())[Q0] for model in (before, after)]
    assert mx.array_equal(pairs[0]["weight"], pairs[1]["weight"])
    assert not mx.array_equal(pairs[0]["scales"], pairs[1]["scales"])


def test_lossless_rest_belongs_to_the_fused_model_alone(
    make_trained: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = make_trained(bits=4)
    config = FuseConfig(mode="lossless")
    fuse_model(trained.base, trained.adapter, tmp_path / "f", config=config)
    rest = load_adapter(tmp_path / "f" / REST_NAME)
    assert rest.fine_tune_type == "lora"
    assert rest.base.model == str(tmp_path / "f")
    with pytest.raises(DoRAError, match="whose tensors differ"):
        load(trained.base, tmp_path / "f" / REST_NAME)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.9999), ("float16", 0.9)])
def test_lossless_scales_keep_a_small_magnitude(
    make_trained: Callable[..., Trained], tmp_path: Path, dtype: str, least: float
) -> None:
    """An update of only the magnitude (g − 1 around .0015) is kept in the scales."""
    trained = make_trained(size=0.0, bits=4, dtype=mx.bfloat16)
    config = FuseConfig(mode="lossless", scales=dtype)  # pyright: ignore[reportArgumentType]
    report = fuse_model(trained.base, trained.adapter, tmp_path / "f", config=config)
    assert {layer.dtype for layer in report.layers} == {dtype}
    assert min(layer.kept for layer in report.layers) > least
    w0, adapted = adapted_weight(trained, Q0)
    fused = dense(load(tmp_path / "f")[0], Q0)
    kept = ((adapted - w0) * (fused - w0)).sum() / ((adapted - w0) ** 2).sum()
    assert report.layers[0].kept == pytest.approx(kept, abs=5e-3)


def pack_base(folder: Path, mode: str) -> None:
    """Pack a model on disk in a mode whose scales are bytes."""
    base, _ = load(folder)
    size = {"group_size": 16 if mode == "nvfp4" else 32, "mode": mode}
    nn.quantize(base, **size)
    tensors = dict(tree_flatten(base.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    content = json.loads((folder / "config.json").read_text())
    content["quantization"] = {**size, "bits": 8 if mode == "mxfp8" else 4}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_dequantize_of_byte_scales_keeps_the_models_dtype(
    make_trained: Callable[..., Trained], tmp_path: Path, mode: str, dtype: mx.Dtype
) -> None:
    trained = make_trained(dtype=dtype)
    pack_base(trained.base, mode)
    report = fuse_model(
        trained.base, trained.adapter, tmp_path / "f",
        config=FuseConfig(mode="dequantize"), check_base=False,
    )  # fmt: skip
    unfused, _ = load(trained.base, trained.adapter, check_base=False)
    adapter, modules = load_adapter(trained.adapter), dict(unfused.named_modules())
    in_memory, _ = load(trained.base, trained.adapter, check_base=False)
    fuse_dora(in_memory, dequantize=True)
    streamed, _ = load(tmp_path / "f")
    for fused in (streamed, in_memory):
        for name, value in dict(tree_flatten(fused.parameters())).items():
            assert value.dtype == dtype, name
        for layer in report.layers:
            base = modules[layer.path].base
            w0 = to_numpy(
                mx.dequantize(
                    base.weight, base.scales, None,
                    base.group_size, base.bits, base.mode,
                )
            )  # fmt: skip
            parts = (adapter.tensors[f"{layer.path}.{x}"] for x in ("lora_a", "lora_b"))
            a, b = map(to_numpy, parts)
            turned = w0 + adapter.config.scale * (a @ b).T
            m = to_numpy(adapter.tensors[f"{layer.path}.m"])[:, None]
            exact = m * turned / np.linalg.norm(turned, axis=1, keepdims=True)
            weight = dict(fused.named_modules())[layer.path].weight
            assert_close(weight, exact, dtype)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_lossless_refuses_scales_that_take_no_magnitude(
    make_trained: Callable[..., Trained], tmp_path: Path, mode: str
) -> None:
    trained = make_trained()
    pack_base(trained.base, mode)

    def fuse(out: str, config: FuseConfig) -> None:
        fuse_model(
            trained.base, trained.adapter, tmp_path / out,
            config=config, check_base=False,
        )  # fmt: skip

    with pytest.raises(DoRAError, match=f"{mode} scales .* cannot hold a magnitude"):
        fuse("lossless", FuseConfig(mode="lossless"))
    assert not (tmp_path / "lossless").exists()
    fuse("packed", FuseConfig(keep=0.9))
    unfused, _ = load(trained.base, trained.adapter, check_base=False)
    packed = mlx_lm.load(str(tmp_path / "packed"))[0]
    assert_close(packed(TOKENS), to_numpy(unfused(TOKENS)), bound=0.05)


@pytest.mark.parametrize("keep", [0.9, 0.99])
def test_requantize_reaches_what_was_asked_in_every_layer(
    make_trained: Callable[..., Trained], tmp_path: Path, keep: float
) -> None:
    trained = make_trained(size=0.002, bits=4)
    config = FuseConfig(keep=keep)
    report = fuse_model(trained.base, trained.adapter, tmp_path / "f", config=config)
    assert report.plain is not None
    assert report.plain.cosine < keep
    model = mlx_lm.load(str(tmp_path / "f"))[0]  # mlx-lm itself reads the mixed packing
    for layer in report.layers:
        w0, adapted = adapted_weight(trained, layer.path)
        exact, left = adapted - w0, dense(model, layer.path) - w0
        kept = (exact * left).sum() / (exact**2).sum()
        cosine = kept * np.linalg.norm(exact) / np.linalg.norm(left)
        assert min(kept, cosine) >= keep
        assert layer.kept == pytest.approx(kept, abs=1e-3)
        assert layer.cosine == pytest.approx(cosine, abs=1e-3)
        norms = [np.linalg.norm(w, axis=1) for w in (w0 + left, adapted)]
        error = np.sqrt(np.mean((norms[0] / norms[1] - 1) ** 2))
        assert layer.survival.row_norm_error == pytest.approx(error, rel=1e-2)
        assert layer.plain is not None
        assert layer.bytes_after > layer.bytes_before


def test_requantize_takes_no_more_bits_than_it_needs(
    make_trained: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = make_trained(size=0.002, bits=4)
    reports = {
        keep: fuse_model(
            trained.base, trained.adapter, tmp_path / str(keep),
            config=FuseConfig(keep=keep),
        )
        for keep in (0.0, 0.5, 0.9, 0.999)
    }  # fmt: skip
    assert {layer.bits for layer in reports[0.0].layers} == {4}
    assert reports[0.0].plain is None
    sizes = [report.bytes_after for report in reports.values()]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2
    config = json.loads((tmp_path / "0.999" / "config.json").read_text())
    assert any(config["quantization"][layer.path] is False
               for layer in reports[0.999].layers)  # fmt: skip


def test_dequantize_is_exact(
    make_trained: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = make_trained(bits=4)
    config = FuseConfig(mode="dequantize")
    report = fuse_model(trained.base, trained.adapter, tmp_path / "f", config=config)
    assert report.total.kept == pytest.approx(1, abs=1e-6)
    model = mlx_lm.load(str(tmp_path / "f"))[0]
    assert not any("scales" in module for module in model.modules())
    assert_close(model(TOKENS), trained.logits, bound=1e-5)


@pytest.mark.parametrize("mode", ["lossless", "requantize", "dequantize"])
def test_packed_embedding_can_be_fused(
    make_trained: Callable[..., Trained], tmp_path: Path, mode: str
) -> None:
    trained = make_trained(keys=(*QV, "model.embed_tokens"), bits=4)
    config = FuseConfig(mode=mode)  # pyright: ignore[reportArgumentType]
    fuse_model(trained.base, trained.adapter, tmp_path / "f", config=config)
    rest = tmp_path / "f" / REST_NAME
    model, _ = load(tmp_path / "f", rest if rest.is_dir() else None)
    bound = 0.05 if mode == "requantize" else 1e-5
    assert_close(model(TOKENS), trained.logits, bound=bound)


def test_streamed_fuse_equals_fuse_in_memory(
    make_trained: Callable[..., Trained], tmp_path: Path
) -> None:
    from mlx_dora import fuse_dora

    trained = make_trained(bits=4)
    model, _ = load(trained.base, trained.adapter)
    expected = fuse_dora(model)
    report = fuse_model(
        trained.base, trained.adapter, tmp_path / "f", config=FuseConfig(keep=0)
    )
    assert report == expected
    streamed, _ = load(tmp_path / "f")
    assert mx.array_equal(streamed(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "sideways"}, "mode must be requantize, lossless or dequantize"),
        ({"scales": "bfloat16"}, "scales must be float32 or float16"),
        ({"keep": 1.0}, "keep must be at least 0 and below 1, got 1.0"),
        ({"keep": float("nan")}, "keep must be"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(DoRAError, match=message):
        FuseConfig(**settings)
