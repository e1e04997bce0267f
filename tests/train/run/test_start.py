from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.errors import DoRAError
from mlx_dora.train.run.start import load_weights, trainable_tensors

CONFIG = DoRAConfig(rank=2, num_layers=1, keys=("self_attn.q_proj",))


@pytest.fixture
def model(make_tiny_model: Callable[..., nn.Module]) -> nn.Module:
    model = make_tiny_model()
    apply_dora(model, CONFIG)
    return model


def saved(tmp_path: Path, tensors: dict[str, mx.array]) -> Path:
    path = tmp_path / "adapters.safetensors"
    mx.save_safetensors(str(path), tensors)
    return path


def test_weights_load_from_file_and_folder(model: nn.Module, tmp_path: Path) -> None:
    wanted = {name: v + 1 for name, v in trainable_tensors(model).items()}
    path = saved(tmp_path, wanted)
    for where in (path, tmp_path):
        load_weights(model, where)
        loaded = trainable_tensors(model)
        assert all(mx.array_equal(loaded[n], v).item() for n, v in wanted.items())


def test_all_mismatches_are_reported_at_once(model: nn.Module, tmp_path: Path) -> None:
    path = "model.layers.1.self_attn.q_proj"
    tensors = trainable_tensors(model)
    tensors[f"{path}.lora_a"] = mx.zeros((32, 3))
    del tensors[f"{path}.m"]
    tensors["other.m"] = mx.zeros(3)
    before = trainable_tensors(model)
    with pytest.raises(DoRAError) as info:
        load_weights(model, saved(tmp_path, tensors))
    message = str(info.value)
    assert f"it lacks {path}.m" in message
    assert "other.m is not trained here" in message
    assert f"{path}.lora_a has shape (32, 3), the model needs (32, 2)" in message
    after = trainable_tensors(model)
    assert all(mx.array_equal(after[n], v).item() for n, v in before.items())


def test_nan_is_refused(model: nn.Module, tmp_path: Path) -> None:
    tensors = trainable_tensors(model)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * mx.nan
    with pytest.raises(DoRAError, match="holds NaN or inf"):
        load_weights(model, saved(tmp_path, tensors))


def test_a_missing_file_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DoRAError, match="does not exist"):
        load_weights(model, tmp_path / "none.safetensors")
