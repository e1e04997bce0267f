"""PEFT's format without PEFT; `tests/compat/test_peft.py` compares with PEFT itself."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from click.testing import CliRunner

from mlx_dora.adapters.adapter import Adapter, take_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.cli.convert import command
from mlx_dora.errors import DoRAError
from mlx_dora.peft import from_peft, to_peft
from mlx_dora.peft.tensors import PEFT_TENSORS_NAME
from tests.adapters.folders import edit_config, names, read_config
from tests.adapters.training import QV, TOKENS, train
from tests.checks import to_numpy

Make = Callable[..., nn.Module]
LAYER = "base_model.model.model.layers.1.self_attn.q_proj"


def adapted(make: Make, kind: str = "dora", **config: Any) -> Adapter:
    model = make()
    settings = {"num_layers": 2, "keys": QV, "rank": 3, **config}
    train(model, DoRAConfig(**settings), kind)
    return take_adapter(model)


def edit(folder: Path, **changes: mx.array | None) -> None:
    """Change PEFT's tensors; None deletes a tensor."""
    path = str(folder / PEFT_TENSORS_NAME)
    tensors = mx.load(path)
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    tensors |= changes  # pyright: ignore[reportOperatorIssue]
    mx.save_safetensors(path, {k: v for k, v in tensors.items() if v is not None})


@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize("scale", [20.0, 0.1, 1 / 3])
@pytest.mark.parametrize("pattern", [None, {"v_proj": 7}], ids=["uniform", "pattern"])
def test_round_trip_is_bit_identical(
    make_tiny_model: Make,
    tmp_path: Path,
    kind: str,
    scale: float,
    pattern: dict[str, int] | None,
) -> None:
    first = adapted(make_tiny_model, kind, scale=scale, rank_pattern=pattern)
    to_peft(first, tmp_path / "peft")
    again = from_peft(tmp_path / "peft")
    assert again.config == first.config
    assert again.base == first.base
    assert again.tensors.keys() == first.tensors.keys()
    assert all(mx.array_equal(again.tensors[n], v) for n, v in first.tensors.items())


def test_names_shapes_and_multiplier_are_pefts(
    make_tiny_model: Make, tmp_path: Path
) -> None:
    adapter = adapted(make_tiny_model, scale=2.0, rank_pattern={"v_proj": 7})
    to_peft(adapter, tmp_path / "peft", base_model_name_or_path="org/base")
    assert names(tmp_path / "peft") == ["adapter_config.json", PEFT_TENSORS_NAME]
    config = read_config(tmp_path / "peft")
    path = "model.layers.1.self_attn.v_proj"
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (7, 14, True)
    assert config["rank_pattern"][path] == 7
    assert config["alpha_pattern"]["model.layers.0.self_attn.q_proj"] == 6
    assert config["target_modules"] == adapter.paths
    assert config["base_model_name_or_path"] == "org/base"
    tensors = mx.load(str(tmp_path / "peft" / PEFT_TENSORS_NAME))
    assert isinstance(tensors, dict)
    name = f"base_model.model.{path}"
    assert tensors[f"{name}.lora_A.weight"].shape == (7, 32)
    assert tensors[f"{name}.lora_B.weight"].shape == (16, 7)
    assert tensors[f"{name}.lora_magnitude_vector"].shape == (16,)


def test_scales_that_differ_fold_into_lora_b(
    make_tiny_model: Make, tmp_path: Path
) -> None:
    adapter = adapted(make_tiny_model, scale=2.0)
    to_peft(adapter, tmp_path / "peft")
    edit_config(tmp_path / "peft", alpha_pattern={"v_proj": 3.0}, use_rslora=True)
    loaded = from_peft(tmp_path / "peft")
    assert loaded.config.scale == pytest.approx(6 / 3**0.5)
    for path in adapter.paths:
        share = 0.5 if path.endswith("v_proj") else 1.0
        name = f"{path}.lora_b"
        expected = share * to_numpy(adapter.tensors[name])
        assert to_numpy(loaded.tensors[name]) == pytest.approx(expected, rel=1e-6)


def test_half_precision_is_widened(make_tiny_model: Make, tmp_path: Path) -> None:
    to_peft(adapted(make_tiny_model), tmp_path / "peft")
    m = mx.arange(1, 33).astype(mx.bfloat16)
    edit(tmp_path / "peft", **{f"{LAYER}.lora_magnitude_vector": m})
    loaded = from_peft(tmp_path / "peft")
    magnitude = loaded.tensors["model.layers.1.self_attn.q_proj.m"]
    assert magnitude.dtype == mx.float32
    assert mx.array_equal(magnitude, mx.arange(1, 33).astype(mx.float32))


@pytest.mark.parametrize("prefix", ["transformer.", "model.language_"])
def test_other_first_parts_of_names_are_matched(
    make_tiny_model: Make, tmp_path: Path, prefix: str
) -> None:
    adapter = adapted(make_tiny_model)
    to_peft(adapter, tmp_path / "peft")
    tensors = mx.load(str(tmp_path / "peft" / PEFT_TENSORS_NAME))
    assert isinstance(tensors, dict)
    swapped = {
        k.replace(".model.model.", f".model.{prefix}model.", 1) if "_" in prefix
        else k.replace(".model.model.", f".model.{prefix}", 1): v
        for k, v in tensors.items()
    }  # fmt: skip
    mx.save_safetensors(str(tmp_path / "peft" / PEFT_TENSORS_NAME), swapped)
    edit_config(tmp_path / "peft", target_modules=["q_proj", "v_proj"])
    loaded = from_peft(tmp_path / "peft", make_tiny_model())
    assert loaded.paths == adapter.paths


REFUSED_CONFIGS = {
    "IA3": {"peft_type": "IA3"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trained biases": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "layers used twice": {"layer_replication": [[0, 2], [1, 2]]},
    "adapters on bare parameters": {"target_parameters": ["experts.gate_up_proj"]},
    "changed at the start": {"init_lora_weights": "pissa_niter_4"},
    "outside target_modules": {"target_modules": ["q_proj"]},
    "rank 3; the config says 4": {"r": 4},
    "not lora parameters": {"use_dora": False},
}


@pytest.mark.parametrize("message", REFUSED_CONFIGS)
def test_settings_that_cannot_be_expressed_are_refused(
    make_tiny_model: Make, tmp_path: Path, message: str
) -> None:
    to_peft(adapted(make_tiny_model), tmp_path / "peft")
    edit_config(tmp_path / "peft", **REFUSED_CONFIGS[message])
    with pytest.raises(DoRAError, match=message):
        from_peft(tmp_path / "peft")


def test_damaged_tensors_are_refused_by_name(
    make_tiny_model: Make, tmp_path: Path
) -> None:
    cases: list[tuple[str, mx.array | None, str]] = [
        (f"{LAYER}.lora_magnitude_vector", None, r"missing: .*q_proj\.m"),
        (f"{LAYER}.lora_A.weight", mx.full((3, 32), mx.nan), "NaN or inf in"),
        (f"{LAYER}.lora_A.weight", mx.zeros((3, 32, 1, 1)), "convolutions"),
        ("base_model.model.embed.lora_embedding_A", mx.zeros((3, 9)), "embeddings"),
        ("base_model.model.norm.lora_other", mx.zeros(3), "are not those of a LoRA"),
        ("base_model.model.lm_head.weight", mx.zeros((3, 3)), "give the model"),
    ]
    for number, (name, value, message) in enumerate(cases):
        folder = tmp_path / str(number)
        to_peft(adapted(make_tiny_model), folder)
        edit(folder, **{name: value})
        with pytest.raises(DoRAError, match=message):
            from_peft(folder)


def test_a_model_that_does_not_fit_is_refused(
    make_tiny_model: Make, tmp_path: Path
) -> None:
    to_peft(adapted(make_tiny_model), tmp_path / "peft")
    with pytest.raises(DoRAError, match="the model needs"):
        from_peft(tmp_path / "peft", make_tiny_model(hidden_size=64))
    edit_config(tmp_path / "peft", target_modules=["q_proj", "v_proj", "o_proj"])
    with pytest.raises(DoRAError, match=r"has no tensors: .*layers\.0\.self_attn\.o_"):
        from_peft(tmp_path / "peft", make_tiny_model())
    with pytest.raises(DoRAError, match=r"no module of the model matches .*layers\.1"):
        from_peft(tmp_path / "peft", make_tiny_model(num_hidden_layers=1))


def test_pickles_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(DoRAError, match="pickle"):
        from_peft(tmp_path)


def test_embeddings_and_full_fine_tuning_are_not_converted_to_peft(
    make_tiny_model: Make, tmp_path: Path
) -> None:
    for kind in ("dora", "lora"):
        adapter = adapted(make_tiny_model, kind, keys=("model.embed_tokens",))
        with pytest.raises(DoRAError, match=r"embeddings .* model\.embed_tokens"):
            to_peft(adapter, tmp_path / "peft")
    full = Adapter(
        config=DoRAConfig(), tensors={"w": mx.ones(3)}, fine_tune_type="full"
    )
    with pytest.raises(DoRAError, match="full fine-tuning"):
        to_peft(full, tmp_path / "peft")
    experts = {"e.lora_a": mx.ones((2, 3, 8)), "e.lora_b": mx.ones((2, 8, 3))}
    moe = Adapter(config=DoRAConfig(rank=3), tensors=experts, fine_tune_type="lora")
    with pytest.raises(DoRAError, match="experts or heads of latent attention: e"):
        to_peft(moe, tmp_path / "peft")
    assert names(tmp_path) == []


def test_zero_rows_are_reported(
    make_tiny_model: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = adapted(make_tiny_model)
    adapter.tensors["model.layers.1.self_attn.q_proj.m"][3] = 0
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        to_peft(adapter, tmp_path / "peft")
    assert "NaN where a row of the base is zero: model.layers.1.self_" in caplog.text


def test_the_command_converts_both_ways(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_tiny_folder("base")
    model, _ = load(base)
    expected = train(model)
    save_adapter(model, tmp_path / "a")

    def run(*args: object) -> tuple[int, str]:
        result = CliRunner().invoke(command, [str(arg) for arg in args])
        return result.exit_code, result.output

    code, said = run(tmp_path / "a", tmp_path / "p", "--to", "peft", "--model", base)
    assert code == 0, said
    assert "Converted 4 modules to peft (dora, rank 8, scale 20)" in said
    assert read_config(tmp_path / "p")["base_model_name_or_path"] == str(base)
    code, said = run(
        tmp_path / "p", tmp_path / "b", "--to", "mlx", "--base-model", "org/name"
    )
    assert code == 0, said
    assert mx.array_equal(load(base, tmp_path / "b")[0](TOKENS), expected)
    assert load_adapter(tmp_path / "b").base.model == "org/name"
    cases = [
        (tmp_path / "a", tmp_path / "p", "--to", "peft", "already exists"),
        (tmp_path / "a", tmp_path / "a", "--to", "peft", "is the input"),
        (tmp_path / "p", tmp_path / "c", "--to", "peft", "looks like a PEFT adapter"),
        (base, tmp_path / "c", "--to", "mlx", "has no adapter_config.json"),
    ]
    for *args, message in cases:
        code, said = run(*args, "-q")
        assert code == 1
        assert message in said
        assert said.count("\n") == 1
    code, said = run(tmp_path / "a", tmp_path / "a", "--to", "peft", "--overwrite")
    assert code == 1
    assert "is the input" in said
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())
