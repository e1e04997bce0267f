from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.fingerprint import base_tensors, fingerprint
from mlx_dora.adapters.surgery import apply_layers, remove_dora

CONFIG = DoRAConfig(num_layers=1, keys=("self_attn.q_proj", "model.embed_tokens"))
Make = Callable[..., nn.Module]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_adapters_do_not_affect_the_fingerprint(
    make_tiny_model: Make, bits: int, kind: str
) -> None:
    model = make_tiny_model(bits=bits)
    before = fingerprint(model)
    names = base_tensors(model).keys()
    apply_layers(model, CONFIG, kind)  # pyright: ignore[reportArgumentType]
    assert base_tensors(model).keys() == names
    assert fingerprint(model) == before
    remove_dora(model)
    assert fingerprint(model) == before


def test_same_model_has_the_same_fingerprint(make_tiny_model: Make) -> None:
    value = fingerprint(make_tiny_model(seed=3))
    assert fingerprint(make_tiny_model(seed=3)) == value
    assert value.startswith("sha256:")
    assert len(value) == 71


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"dtype": mx.bfloat16},
        {"bits": 4},
        {"tie_word_embeddings": False},
        {"num_hidden_layers": 3},
    ],
)
def test_another_model_has_another_fingerprint(
    make_tiny_model: Make, other: dict
) -> None:
    assert fingerprint(make_tiny_model(**other)) != fingerprint(make_tiny_model())


def test_changed_values_change_the_fingerprint(tiny_model: nn.Module) -> None:
    before = fingerprint(tiny_model)
    tiny_model["model"]["layers"][1].mlp.down_proj.weight *= 1.001
    assert fingerprint(tiny_model) != before


def test_few_tensors_of_a_lazy_model_are_read(
    make_tiny_model: Make, tmp_path: Path
) -> None:
    count, width = 64, 512
    path = tmp_path / "w.safetensors"
    mx.save_safetensors(
        str(path), {f"{i}": mx.random.normal((width, width)) for i in range(count)}
    )
    lazy = mx.load(str(path))
    assert isinstance(lazy, dict)
    model = nn.Module()
    model.parts = [nn.Linear(1, 1, bias=False) for _ in range(count)]
    for i, part in enumerate(model.parts):
        part.weight = lazy[f"{i}"]
    del lazy
    before = mx.get_active_memory()
    fingerprint(model)
    read = (mx.get_active_memory() - before) / (width * width * 4)
    assert read <= 16.5
