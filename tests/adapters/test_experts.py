"""Whole models with experts: adapted, trained, saved, loaded, fused, compared."""

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_dora import (
    DoRAConfig,
    DoRAError,
    DoRASwitchLinear,
    apply_dora,
    disabled,
    fuse_dora,
    load_adapter,
    remove_dora,
    save_adapter,
)
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.fuse_config import FuseConfig
from mlx_dora.adapters.fuse_stream import stream_fused
from mlx_dora.adapters.surgery import adapter_layers
from mlx_dora.train import TrainConfig, finetune
from tests.checks import assert_close, to_numpy

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": 64,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 128,
        "norm_topk_prob": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 64,
    },
}
TOKENS = mx.array([[(7 * i + 3 * j) % 64 for j in range(24)] for i in range(4)])
ROWS = [[(start * 7 + step * 3) % 64 for step in range(24)] for start in range(16)]
DORA = DoRAConfig(rank=3, scale=2.0, num_layers=2)


def make_model(kind: str, bits: int | None) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(MODELS[kind]))
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    mx.eval(model.parameters())
    return model.eval()


def trained(model: nn.Module, folder: Path) -> list[float]:
    """Train on counting, and give the losses."""
    losses: list[float] = []
    finetune(
        model,
        None,
        ROWS,
        None,
        train=TrainConfig(
            iters=12, batch_size=4, learning_rate=1e-2, steps_per_report=1
        ),
        dora=DORA,
        adapter_path=folder,
        callback=lambda one: losses.append(one.train_loss or 0.0),
    )
    return losses


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", list(MODELS))
def test_trains_saves_loads_and_fuses(
    kind: str, bits: int | None, tmp_path: Path
) -> None:
    model = make_model(kind, bits)
    base = model(TOKENS)
    losses = trained(model, tmp_path / "adapter")
    assert losses[-1] < losses[0] - 0.5
    experts = [p for p, one in adapter_layers(model) if type(one) is DoRASwitchLinear]
    assert len(experts) == 6  # gate, up and down of two blocks
    model.eval()
    adapted = to_numpy(model(TOKENS))

    again = make_model(kind, bits)
    attach_adapter(again, load_adapter(tmp_path / "adapter"))
    assert_close(again(TOKENS), adapted)
    with disabled(again):
        assert mx.array_equal(again(TOKENS), base)
    report = fuse_dora(again, dequantize=True)
    assert {one.path for one in report.layers} >= set(experts)
    assert report.total.kept == pytest.approx(1, abs=1e-3)
    assert_close(again(TOKENS), adapted, bound=1e-4)

    remove_dora(model)
    assert mx.array_equal(model(TOKENS), base)


@pytest.mark.parametrize("bits", [None, 4])
def test_streamed_fuse_equals_the_one_in_memory(
    bits: int | None, tmp_path: Path
) -> None:
    trained(make_model("qwen3_moe", bits), tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    model = make_model("qwen3_moe", bits)
    attach_adapter(model, adapter)
    fuse_dora(model)
    expected = dict(tree_flatten(model.parameters()))
    written: dict[str, mx.array] = {}
    fused = stream_fused(
        make_model("qwen3_moe", bits),
        adapter,
        FuseConfig(keep=0.0),
        lambda name, value: written.update({name: mx.array(value)}),
    )
    assert not fused.packing
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.allclose(written[name], value, rtol=1e-5, atol=1e-6), name


def test_packed_experts_get_bits_until_enough_is_kept(tmp_path: Path) -> None:
    trained(make_model("qwen3_moe", 2), tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    written: dict[str, mx.array] = {}
    fused = stream_fused(
        make_model("qwen3_moe", 2),
        adapter,
        FuseConfig(keep=0.95),
        lambda name, value: written.update({name: mx.array(value)}),
    )
    layers = {one.path: one for one in fused.layers}
    stacks = [path for path in layers if "switch_mlp" in path]
    assert stacks
    for path in stacks:
        assert layers[path].survival.survives(0.95)
        setting = fused.packing.get(path)
        if setting is None:
            continue
        model = make_model("qwen3_moe", None)
        if setting:
            assert isinstance(setting, dict)
            nn.quantize(
                model,
                group_size=setting["group_size"],
                bits=setting["bits"],
                class_predicate=lambda p, _, path=path: p == path,
            )
        like: Any = dict(tree_flatten(model.parameters()))[f"{path}.weight"]
        assert written[f"{path}.weight"].shape == like.shape
    with pytest.raises(DoRAError, match="cannot be fused losslessly yet"):
        stream_fused(
            make_model("qwen3_moe", 4),
            adapter,
            FuseConfig(mode="lossless"),
            lambda _name, _value: None,
        )


def test_the_folder_holds_mlx_lm_s_layout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = make_model("mixtral", None)
    apply_dora(model, DORA)
    save_adapter(model, tmp_path / "dora")
    assert "stock mlx-lm cannot run DoRA on experts" in caplog.text
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    tensors: Any = mx.load(str(tmp_path / "dora" / "adapters.safetensors"))
    theirs = make_model("mixtral", None)
    keys = config["lora_parameters"]["keys"]
    linear_to_lora_layers(
        theirs,
        2,
        {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": keys},
    )
    shapes = {
        name: value.shape
        for name, value in tree_flatten(theirs.parameters())
        if name.rpartition(".")[2] in ("lora_a", "lora_b")
        and isinstance(value, mx.array)
    }
    found = {n: v.shape for n, v in tensors.items() if not n.endswith(".m")}
    assert found == shapes
