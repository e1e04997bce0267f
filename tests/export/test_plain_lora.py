"""A LoRA nearest to a DoRA adapter, against float64 singular values."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.adapters.adapter import take_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import apply_layers
from mlx_dora.errors import DoRAError
from mlx_dora.export.convert import convert_to_lora
from mlx_dora.export.plain_lora import to_lora
from tests.adapters.swift_host import swift_load
from tests.adapters.training import QV, TOKENS, perturb, train
from tests.checks import to_numpy
from tests.layers.oracle import dense_weight

Make = Callable[..., nn.Module]
KEYS = (*QV, "mlp.down_proj")


def change(weight: np.ndarray, tensors: dict, path: str, scale: float) -> np.ndarray:
    """W' − W0 in float64."""
    a, b, m = (
        to_numpy(tensors[f"{path}.{leaf}"]).astype(np.float64)
        for leaf in ("lora_a", "lora_b", "m")
    )
    adapted = weight + scale * (a @ b).T
    norm = np.linalg.norm(adapted, axis=1)
    return adapted * (m / norm)[:, None] - weight


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("rank", [1, 8, 16])
def test_error_of_each_layer_is_the_least(
    make_tiny_model: Make, rank: int, bits: int | None
) -> None:
    model = make_tiny_model(bits=bits)
    train(model, DoRAConfig(num_layers=2, keys=KEYS))
    adapter = take_adapter(model)
    base = make_tiny_model(bits=bits)
    made = to_lora(adapter, base, rank)
    assert made.adapter.fine_tune_type == "lora"
    assert made.adapter.config.rank == rank
    modules = dict(base.named_modules())
    scale = adapter.config.scale
    for layer in made.layers:
        weight = dense_weight(modules[layer.path]).astype(np.float64)
        wanted = change(weight, adapter.tensors, layer.path, scale)
        values = np.linalg.svd(wanted, compute_uv=False)
        least = np.sqrt(np.square(values[rank:]).sum() / np.square(values).sum())
        assert layer.error == pytest.approx(least, rel=1e-3, abs=1e-6)
        a = to_numpy(made.adapter.tensors[f"{layer.path}.lora_a"]).astype(np.float64)
        b = to_numpy(made.adapter.tensors[f"{layer.path}.lora_b"]).astype(np.float64)
        kept = made.adapter.config.scale * (a @ b).T
        error = np.linalg.norm(kept - wanted) / np.linalg.norm(wanted)
        assert layer.error == pytest.approx(error, rel=1e-3, abs=1e-6)
        norm = np.linalg.norm(weight + wanted, axis=1)
        assert np.isfinite(norm).all()


def test_at_full_rank_the_lora_says_the_same(make_tiny_model: Make) -> None:
    model = make_tiny_model()
    expected = train(model, DoRAConfig(num_layers=2, keys=QV))
    base = make_tiny_model()
    made = to_lora(take_adapter(model), base, 32)
    from mlx_dora.adapters.attach import attach_adapter

    attach_adapter(base, made.adapter, check_base=False)
    np.testing.assert_allclose(
        to_numpy(base(TOKENS)), to_numpy(expected), atol=3e-5, rtol=1e-4
    )


def test_embeddings_convert(make_tiny_model: Make) -> None:
    model = make_tiny_model()
    keys = ("model.embed_tokens",)
    expected = train(model, DoRAConfig(num_layers=2, keys=keys))
    base = make_tiny_model()
    made = to_lora(take_adapter(model), base, 32)
    from mlx_dora.adapters.attach import attach_adapter

    attach_adapter(base, made.adapter, check_base=False)
    np.testing.assert_allclose(
        to_numpy(base(TOKENS)), to_numpy(expected), atol=3e-5, rtol=1e-4
    )


def test_a_lora_of_at_most_the_rank_comes_back(make_tiny_model: Make) -> None:
    model = make_tiny_model()
    train(model, DoRAConfig(num_layers=2, keys=QV, rank=4), "lora")
    adapter = take_adapter(model)
    made = to_lora(adapter, make_tiny_model(), 4)
    assert made.adapter is adapter
    assert {layer.error for layer in made.layers} == {0.0}
    smaller = to_lora(adapter, make_tiny_model(), 2)
    assert smaller.adapter.config.rank == 2
    assert all(0 < layer.error < 1 for layer in smaller.layers)


def test_bad_input_is_refused(make_tiny_model: Make) -> None:
    model = make_tiny_model()
    train(model)
    adapter = take_adapter(model)
    with pytest.raises(DoRAError, match="at most 32, got 33"):
        to_lora(adapter, make_tiny_model(), 33)
    with pytest.raises(DoRAError, match="at least 1, got 0"):
        to_lora(adapter, make_tiny_model(), 0)
    with pytest.raises(DoRAError, match="does not fit"):
        to_lora(adapter, make_tiny_model(hidden_size=64), 4)


def test_folder_loads_in_stock_mlx_lm_and_under_swifts_rules(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    import mlx_lm

    base = make_tiny_folder("base")
    model, _ = load(base)
    mx.random.seed(3)
    apply_layers(model, DoRAConfig(num_layers=1, keys=QV), "dora")
    perturb(model)
    save_adapter(model, tmp_path / "dora")
    data = tmp_path / "data"
    data.mkdir()
    (data / "valid.jsonl").write_text('{"text": "the quick brown fox"}\n' * 3)
    made = convert_to_lora(
        tmp_path / "dora", tmp_path / "lora", model=base, rank=8, data=str(data)
    )
    assert made.loss is not None
    assert abs(made.loss.lora - made.loss.adapter) < abs(
        made.loss.base - made.loss.adapter
    )
    ours = load(base, tmp_path / "lora")[0](TOKENS)
    theirs = mlx_lm.load(str(base), adapter_path=str(tmp_path / "lora"))[0](TOKENS)
    np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), rtol=1e-5, atol=1e-6)
    assert len(swift_load(load(base)[0], tmp_path / "lora").used) == 4
    assert load_adapter(tmp_path / "lora").fine_tune_type == "lora"
