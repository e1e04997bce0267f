"""The whole way of an adapter on a real model, next to stock mlx-lm."""

from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import apply_dora, disabled, dora_layers, remove_dora
from mlx_dora.fuse.model import fuse_model
from tests.checks import assert_close, to_numpy


@pytest.mark.slow
@pytest.mark.real_model
def test_adapter_means_the_same_everywhere(smollm: Path, tmp_path: Path) -> None:
    model, tokenizer = load(smollm)
    tokens = mx.array([tokenizer.encode("The capital of France is Paris, and of")])
    base = model(tokens)
    paths = apply_dora(model, DoRAConfig(num_layers=-1))
    assert len(paths) == 210
    assert mx.array_equal(model(tokens), base)
    mx.random.seed(0)
    for _, layer in dora_layers(model):
        layer.lora_b = 0.0005 * mx.random.normal(layer.lora_b.shape)
        layer.m = layer.m * (1 + 0.003 * mx.random.normal(layer.m.shape))
    adapted = to_numpy(model(tokens))
    assert mx.max(mx.abs(model(tokens) - base)).item() > 0.1  # pyright: ignore[reportOperatorIssue]
    with disabled(model):
        assert mx.array_equal(model(tokens), base)
    save_adapter(model, tmp_path / "adapter")
    remove_dora(model)
    assert mx.array_equal(model(tokens), base)
    del model
    stock = mlx_lm.load(str(smollm), adapter_path=str(tmp_path / "adapter"))[0]
    assert_close(stock(tokens), adapted, bound=1e-4)  # 30 layers of float32
    del stock
    report = fuse_model(smollm, tmp_path / "adapter", tmp_path / "fused")
    assert report.bytes_after == report.bytes_before
    fused, _ = load(tmp_path / "fused")
    assert_close(fused(tokens), adapted, bound=1e-4)
