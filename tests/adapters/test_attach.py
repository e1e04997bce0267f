from collections.abc import Callable
from pathlib import Path

import mlx.nn as nn
import pytest

from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.files import load_adapter
from mlx_dora.adapters.surgery import dora_layers, remove_dora
from mlx_dora.errors import DoRAError
from tests.adapters.folders import edit_config, read_config

Make = Callable[..., nn.Module]
Q0 = "model.layers.0.self_attn.q_proj"


def test_all_misfits_are_reported_in_one_message(
    make_tiny_model: Make, saved: Path
) -> None:
    adapter = load_adapter(saved)
    model = make_tiny_model(seed=5, hidden_size=64, num_hidden_layers=1)
    with pytest.raises(DoRAError) as caught:
        attach_adapter(model, adapter)
    message = str(caught.value)
    assert "trained on some/model, whose tensors differ" in message
    assert "no such modules in the model: model.layers.1.self_attn.q_proj" in message
    assert f"{Q0}.lora_a has shape (32, 8); the model needs (64, 8)" in message
    assert f"{Q0}.m has shape (32,); the model needs (64,)" in message
    assert "\n" not in message
    assert dora_layers(model) == []


def test_another_base_is_refused_unless_asked(
    make_tiny_model: Make, saved: Path
) -> None:
    adapter = load_adapter(saved)
    model = make_tiny_model(seed=1)
    with pytest.raises(DoRAError, match="trained on some/model"):
        attach_adapter(model, adapter)
    assert len(attach_adapter(model, adapter, check_base=False)) == 4


def test_keys_and_tensors_must_agree(make_tiny_model: Make, saved: Path) -> None:
    config = read_config(saved)["lora_parameters"]
    edit_config(saved, lora_parameters={**config, "keys": config["keys"][1:]})
    with pytest.raises(DoRAError, match=f"the config does not adapt: {Q0}"):
        attach_adapter(make_tiny_model(), load_adapter(saved))
    more = "model.layers.0.mlp.up_proj"
    edit_config(saved, lora_parameters={**config, "keys": [*config["keys"], more]})
    with pytest.raises(DoRAError, match=f"modules that have no tensors: {more}"):
        attach_adapter(make_tiny_model(), load_adapter(saved))


def test_adapted_model_is_refused(tiny_model: nn.Module, saved: Path) -> None:
    with pytest.raises(DoRAError, match="4 adapted layers already"):
        attach_adapter(tiny_model, load_adapter(saved))
    remove_dora(tiny_model)
    attach_adapter(tiny_model, load_adapter(saved))


def test_module_that_cannot_take_dora_is_named(
    tiny_model: nn.Module, saved: Path
) -> None:
    class Doubling(nn.Linear):
        pass

    remove_dora(tiny_model)
    tiny_model["model"]["layers"][0].self_attn.q_proj = Doubling(32, 32, bias=False)
    with pytest.raises(DoRAError, match=f"{Q0}: .*Doubling cannot take DoRA"):
        attach_adapter(tiny_model, load_adapter(saved), check_base=False)
