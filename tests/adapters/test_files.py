import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora.adapters.adapter import Adapter, BaseModel
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import (
    load_adapter,
    save_adapter,
    write_adapter_files,
)
from mlx_dora.adapters.surgery import dora_layers
from mlx_dora.errors import DoRAError
from tests.adapters.folders import edit_config, edit_tensors, names, read_config
from tests.adapters.training import QV, TOKENS, perturb, train

Make = Callable[..., nn.Module]
Q0 = "model.layers.0.self_attn.q_proj"


def test_round_trip_is_exact(make_tiny_model: Make, saved: Path) -> None:
    expected = train(make_tiny_model())
    model = make_tiny_model()
    model.eval()
    adapter = load_adapter(saved)
    paths = attach_adapter(model, adapter)
    assert paths == [f"model.layers.{i}.{key}" for i in (0, 1) for key in QV]
    assert mx.array_equal(model(TOKENS), expected)
    assert adapter.config.keys == QV
    assert adapter.paths == paths
    assert adapter.base.model == "some/model"


def test_format_is_mlx_lms(saved: Path) -> None:
    assert names(saved) == ["adapter_config.json", "adapters.safetensors"]
    config = read_config(saved)
    assert config["fine_tune_type"] == "dora"
    assert config["num_layers"] == 2
    assert config["lora_parameters"] == {
        "rank": 8,
        "scale": 20.0,
        "dropout": 0.0,
        "keys": list(QV),
    }
    ours = config["mlx_dora"]
    assert ours["version"] == 1
    assert ours["variant"] == "dora"
    assert ours["base"]["fingerprint"].startswith("sha256:")
    tensors = mx.load(str(saved / "adapters.safetensors"))
    assert isinstance(tensors, dict)
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_a", "lora_b", "m"}
    assert {tensor.dtype for tensor in tensors.values()} == {mx.float32}


def test_dropout_and_num_layers_are_kept(tiny_model: nn.Module, tmp_path: Path) -> None:
    config = DoRAConfig(num_layers=1, dropout=0.05)
    train(tiny_model, config)
    save_adapter(tiny_model, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    assert adapter.config.dropout == 0.05
    assert adapter.config.num_layers == 1


def test_ranks_are_padded_on_disk_and_stripped(
    make_tiny_model: Make, tmp_path: Path
) -> None:
    config = DoRAConfig(
        num_layers=2, keys=(*QV, "model.embed_tokens"), rank=3,
        rank_pattern={"v_proj": 5, "embed_tokens": 2},
    )  # fmt: skip
    model = make_tiny_model()
    expected = train(model, config)
    save_adapter(model, tmp_path / "a")
    raw = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    assert isinstance(raw, dict)
    assert raw[f"{Q0}.lora_a"].shape == (32, 5)
    assert raw["model.embed_tokens.lora_b"].shape == (5, 32)
    assert read_config(tmp_path / "a")["lora_parameters"]["rank"] == 5
    adapter = load_adapter(tmp_path / "a")
    assert adapter.tensors[f"{Q0}.lora_a"].shape == (32, 3)
    assert adapter.tensors["model.embed_tokens.lora_b"].shape == (2, 32)
    again = make_tiny_model()
    again.eval()
    attach_adapter(again, adapter)
    assert mx.array_equal(again(TOKENS), expected)
    save_adapter(adapter, tmp_path / "b")
    assert read_config(tmp_path / "b") == read_config(tmp_path / "a")
    copy = mx.load(str(tmp_path / "b" / "adapters.safetensors"))
    assert isinstance(copy, dict)
    assert copy.keys() == raw.keys()
    assert all(mx.array_equal(copy[name], raw[name]) for name in raw)


def test_padding_that_is_not_zero_is_refused(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    config = DoRAConfig(num_layers=1, keys=QV, rank_pattern={"q_proj": 2})
    train(tiny_model, config)
    save_adapter(tiny_model, tmp_path / "a")
    name = "model.layers.1.self_attn.q_proj.lora_a"
    edit_tensors(tmp_path / "a", **{name: mx.ones((32, 8))})
    with pytest.raises(
        DoRAError, match=r"q_proj.lora_a has .*rank 8; the config says 2"
    ):
        load_adapter(tmp_path / "a")


def test_scales_that_differ_are_folded(make_tiny_model: Make, tmp_path: Path) -> None:
    config = DoRAConfig(
        num_layers=2, keys=QV, scale=8.0, rank=4, use_rslora=True,
        rank_pattern={"q_proj": 16},
    )  # fmt: skip
    model = make_tiny_model()
    expected = train(model, config)
    assert len({layer.scale for _, layer in dora_layers(model)}) == 2
    save_adapter(model, tmp_path / "a")
    again = make_tiny_model()
    again.eval()
    attach_adapter(again, load_adapter(tmp_path / "a"))
    assert {layer.scale for _, layer in dora_layers(again)} == {4.0}
    assert mx.allclose(again(TOKENS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_other_kinds_round_trip(
    make_tiny_model: Make, tmp_path: Path, kind: str
) -> None:
    model = make_tiny_model()
    expected = train(model, DoRAConfig(num_layers=1, rank=4), kind)
    if kind == "full":
        block = model["model"]["layers"][1]
        block.mlp.up_proj.weight *= 1.5
        expected = model(TOKENS)
        write_adapter_files(model, tmp_path / "a", fine_tune_type="full")
    else:
        save_adapter(model, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    assert adapter.fine_tune_type == kind
    again = make_tiny_model()
    again.eval()
    attach_adapter(again, adapter)
    assert mx.array_equal(again(TOKENS), expected)


def test_missing_parameters_are_all_named(saved: Path) -> None:
    edit_tensors(saved, **{f"{Q0}.m": None, f"{Q0}.lora_b": None, "x.y": mx.ones(2)})
    with pytest.raises(DoRAError) as caught:
        load_adapter(saved)
    message = str(caught.value)
    assert f"missing: {Q0}.lora_b, {Q0}.m" in message
    assert "not dora parameters: x.y" in message
    assert "\n" not in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(saved: Path, bad: float) -> None:
    value = mx.ones(32)
    value[3] = bad
    edit_tensors(saved, **{f"{Q0}.m": value})
    with pytest.raises(DoRAError, match=f"NaN or inf in {Q0}.m"):
        load_adapter(saved)


def test_adapter_without_tensors_is_refused(saved: Path) -> None:
    mx.save_safetensors(str(saved / "adapters.safetensors"), {})
    with pytest.raises(DoRAError, match="it holds no tensors"):
        load_adapter(saved)
    (saved / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(DoRAError, match="it is empty"):
        load_adapter(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "qlora"}, "must be dora, lora or full, got 'qlora'"),
        ({"lora_parameters": None}, "lora_parameters must be an object"),
        ({"lora_parameters": {"rank": 8}}, "lacks scale"),
        ({"lora_parameters": {"rank": 8, "alpha": 16}}, "uses 'scale'"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "at least 1, got 0"),
        ({"lora_parameters": {"rank": 8, "scale": float("nan")}}, "finite"),
        ({"num_layers": "two"}, "num_layers must be"),
        ({"mlx_dora": {"version": 2}}, "newer than this mlx_dora supports"),
        (
            {"mlx_dora": {"version": 1, "variant": "map"}},
            "variant must be dora, got 'map'",
        ),
        ({"mlx_dora": {"version": 1, "rank_pattern": {"q": 0}}}, "at least 1, got 0"),
        (
            {"mlx_dora": {"version": 1, "base": 3}},
            "mlx_dora.base must be a mapping, got 3",
        ),
        (
            {"mlx_dora": {"version": 1, "base": {"model": 3}}},
            "base 'model' must be text",
        ),
        ({"mlx_dora": {"version": "1"}}, "mlx_dora.version must be a whole number"),
        ({"mlx_dora": {"version": 1, "training": [1]}}, "training must be a mapping"),
        ({"mlx_dora": []}, "mlx_dora must be an object"),
    ],
)
def test_bad_config_is_refused(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(saved, **changes)
    with pytest.raises(DoRAError) as caught:
        load_adapter(saved)
    assert message in str(caught.value)
    assert "adapter_config.json" in str(caught.value)


def test_folder_that_is_not_an_adapter_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DoRAError, match="there is no such folder"):
        load_adapter(tmp_path / "none")
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(DoRAError, match="is not JSON"):
        load_adapter(saved)
    (saved / "adapter_config.json").write_text("[]")
    with pytest.raises(DoRAError, match="must hold a JSON object"):
        load_adapter(saved)
    (saved / "adapter_config.json").unlink()
    (saved / "adapter_model.safetensors").touch()
    with pytest.raises(
        DoRAError, match=r"no adapter_config.json. It looks like a PEFT"
    ):
        load_adapter(saved)


def test_existing_output_is_refused(tiny_model: nn.Module, saved: Path) -> None:
    before = (saved / "adapters.safetensors").read_bytes()
    perturb(tiny_model, 0.5)
    with pytest.raises(DoRAError, match="already exists"):
        save_adapter(tiny_model, saved)
    assert (saved / "adapters.safetensors").read_bytes() == before
    save_adapter(tiny_model, saved, overwrite=True)
    assert (saved / "adapters.safetensors").read_bytes() != before
    assert names(saved.parent) == ["adapter"]


def test_bad_values_are_not_saved(tiny_model: nn.Module, tmp_path: Path) -> None:
    train(tiny_model)
    write_adapter_files(tiny_model, tmp_path / "live")
    before = (tmp_path / "live" / "adapters.safetensors").read_bytes()
    layer = dora_layers(tiny_model)[0][1]
    layer.m = layer.m * float("nan")
    with pytest.raises(DoRAError, match="a is not written: NaN or inf in"):
        save_adapter(tiny_model, tmp_path / "a")
    with pytest.raises(DoRAError, match="is unchanged: NaN or inf in"):
        write_adapter_files(tiny_model, tmp_path / "live")
    assert names(tmp_path) == ["live"]
    assert (tmp_path / "live" / "adapters.safetensors").read_bytes() == before


def test_model_without_adapter_is_not_saved(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(DoRAError, match="no adapted layers"):
        save_adapter(tiny_model, tmp_path / "a")
    tiny_model.freeze()
    with pytest.raises(DoRAError, match="no trainable parameters"):
        write_adapter_files(tiny_model, tmp_path / "a", fine_tune_type="full")
    assert names(tmp_path) == []


def test_live_folder_keeps_its_other_files(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    train(tiny_model)
    (tmp_path / "log.jsonl").write_text("{}\n")
    base = BaseModel(model="some/model", fingerprint="sha256:0")
    for step in (1, 2):
        perturb(tiny_model, step)
        write_adapter_files(tiny_model, tmp_path, base=base, training={"step": step})
    assert names(tmp_path) == [
        "adapter_config.json",
        "adapters.safetensors",
        "log.jsonl",
    ]
    adapter = load_adapter(tmp_path)
    assert adapter.base == base
    assert adapter.training == {"step": 2}
    write_adapter_files(adapter, tmp_path, training={"step": 3})
    assert load_adapter(tmp_path).training == {"step": 3}


def warnings_of_saving(
    model_or_adapter: nn.Module | Adapter,
    path: Path,
    caplog: pytest.LogCaptureFixture,
) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        save_adapter(model_or_adapter, path)
    return caplog.text


def test_saving_warns_about_modules_that_stock_mlx_lm_cannot_load(
    make_tiny_model: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny_model()
    train(model)
    assert warnings_of_saving(model, tmp_path / "plain", caplog) == ""
    three = make_tiny_model(bits=3)
    train(three, DoRAConfig(num_layers=1, keys=(QV[0], "model.embed_tokens")))
    text = warnings_of_saving(three, tmp_path / "three", caplog)
    assert "bit bases; use mlx_dora.load" in text
    assert "model.layers.1.self_attn.q_proj" in text
    assert "quantized embeddings" in text
    zero = make_tiny_model()
    zero["model"]["layers"][1].self_attn.q_proj.weight[3] = 0
    train(zero)
    text = warnings_of_saving(zero, tmp_path / "zero", caplog)
    assert "zero rows (it computes NaN)" in text
    assert "layers.1.self_attn.q_proj" in text
    assert "layers.0.self_attn.q_proj" not in text


def test_config_keys_are_written_resolved(saved: Path, tmp_path: Path) -> None:
    adapter = load_adapter(saved)
    relative = replace(adapter, config=replace(adapter.config, keys=QV))
    save_adapter(relative, tmp_path / "b")
    assert read_config(tmp_path / "b") == read_config(saved)
