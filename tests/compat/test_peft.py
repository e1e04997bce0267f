"""Real PEFT on our adapters, and our layers on PEFT's: outputs and gradients agree."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRALinear
from mlx_dora.peft import from_peft, to_peft
from tests.adapters.training import QV, TOKENS, train
from tests.checks import assert_close, to_numpy
from tests.compat.peer_process import peer_version, run_peer
from tests.hosts import ran

pytestmark = pytest.mark.slow

MakeFolder = Callable[..., Path]
LINEARS = (*QV, "self_attn.o_proj", "mlp.down_proj")
UNTIED = {"tie_word_embeddings": False}


def peer(name: str, at: Path, job: dict[str, Any], **given: mx.array) -> dict:
    return run_peer("peft_peer.py", name, at / name, job, given)


def largest(value: mx.array) -> float:
    return mx.max(mx.abs(value)).item()  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize("pattern", [None, {"v_proj": 5}], ids=["one", "pattern"])
def test_peft_says_the_same_with_our_adapter(
    make_tiny_folder: MakeFolder, tmp_path: Path, kind: str, pattern: dict | None
) -> None:
    base = make_tiny_folder("base")
    model, _ = load(base)
    config = DoRAConfig(num_layers=2, keys=LINEARS, rank=3, rank_pattern=pattern)
    ours = train(model, config, kind)
    save_adapter(model, tmp_path / "adapter")
    to_peft(tmp_path / "adapter", tmp_path / "peft", base_model_name_or_path=str(base))
    job = {"model": str(base), "adapter": str(tmp_path / "peft")}
    theirs = peer("logits", tmp_path, job, tokens=TOKENS.astype(mx.int64))
    assert largest(theirs["adapted"] - theirs["base"]) > 0.01
    assert largest(theirs["adapted"] - ours) < 1e-4
    what = "DoRA and LoRA, one rank and several: its logits within 1e-4"
    ran("PEFT", what, version=peer_version("peft"))


CONFIGS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "every linear": {"use_dora": True, "target_modules": "all-linear"},
    "lora": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3},
    "rslora": {"use_dora": True, "use_rslora": True, "target_modules": ["o_proj"]},
    "patterns": {
        "use_dora": True,
        "use_rslora": True,
        "target_modules": r".*\.(q_proj|up_proj)",
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 7},
        "alpha_pattern": {"up_proj": 5},
    },
    "one layer": {
        "use_dora": True,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
    },
    "untied head": {"use_dora": True, "target_modules": ["lm_head", "k_proj"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_we_say_the_same_with_an_adapter_trained_by_peft(
    make_tiny_folder: MakeFolder, tmp_path: Path, name: str
) -> None:
    base = make_tiny_folder("base", **(UNTIED if name == "untied head" else {}))
    job = {
        "model": str(base),
        "adapter": str(tmp_path / "peft"),
        "config": {"r": 4, "lora_alpha": 8, **CONFIGS[name]},
        "learning_rate": 0.02,
        "steps": 4,
    }
    theirs = peer("train", tmp_path, job, tokens=TOKENS.astype(mx.int64))
    assert largest(theirs["adapted"] - theirs["base"]) > 0.01
    model, _ = load(base)
    adapter = from_peft(tmp_path / "peft", model)
    assert adapter.base.model == str(base)
    if name == "untied head":  # PEFT saves a copy of the head, which must be compared
        with pytest.raises(DoRAError, match=r"give the model.*lm_head.base_layer"):
            from_peft(tmp_path / "peft")
    else:
        alone = from_peft(tmp_path / "peft")
        assert alone.paths == adapter.paths
        # Without the model, the form of the keys may not be known.
        form = {"keys": adapter.config.keys, "num_layers": adapter.config.num_layers}
        assert replace(alone.config, **form) == adapter.config
    save_adapter(adapter, tmp_path / "adapter")
    ours, _ = load(base, tmp_path / "adapter")
    assert largest(ours(TOKENS) - theirs["adapted"]) < 1e-4


@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_computes_and_learns_as_pefts(tmp_path: Path, bias: bool) -> None:
    mx.random.seed(0)
    linear = nn.Linear(48, 40, bias=bias)
    layer = DoRALinear.from_base(linear, r=4, scale=2.5)
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
    layer.m = layer.m * (1 + 0.1 * mx.random.normal(layer.m.shape))
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
    x, dy = mx.random.normal((3, 5, 48)), mx.random.normal((3, 5, 40))

    def loss(parameters: dict, x: mx.array) -> mx.array:
        layer.update(parameters)
        return (layer(x) * dy).sum()

    names = ("lora_a", "lora_b", "m")
    ours, dx = mx.grad(loss, argnums=(0, 1))({n: layer[n] for n in names}, x)
    given = {"weight": linear.weight, "x": x, "dy": dy, "m": layer.m}
    given |= {"lora_a": layer.lora_a.T, "lora_b": layer.lora_b.T}
    if bias:
        given["bias"] = linear.bias
    theirs = peer("layer", tmp_path, {"r": 4, "alpha": 10}, **given)
    assert_close(layer(x), to_numpy(theirs["y"]), bound=1e-5)
    assert_close(dx, to_numpy(theirs["x"]), bound=1e-5)
    for name in names:
        assert_close(ours[name], to_numpy(theirs[name].T), bound=1e-5)


@pytest.mark.real_model
def test_smollm_both_ways(smollm: Path, tmp_path: Path) -> None:
    model, tokenizer = load(smollm)
    tokens = mx.array([tokenizer.encode("The capital of France is Paris, and of")])
    config = DoRAConfig(num_layers=8, rank=8, scale=2.0)
    mx.random.seed(0)
    ours = train(model, config)
    save_adapter(model, tmp_path / "adapter")
    to_peft(
        tmp_path / "adapter", tmp_path / "peft", base_model_name_or_path=str(smollm)
    )
    job = {"model": str(smollm), "adapter": str(tmp_path / "peft")}
    theirs = peer("logits", tmp_path, job, tokens=tokens.astype(mx.int64))
    ours = model(tokens)
    assert largest(theirs["adapted"] - theirs["base"]) > 0.1
    assert_close(ours, to_numpy(theirs["adapted"]), bound=2e-5)  # 30 layers of float32
    again = from_peft(tmp_path / "peft")
    first = load_adapter(tmp_path / "adapter")
    assert all(mx.array_equal(again.tensors[n], v) for n, v in first.tensors.items())
    del model
    job |= {
        "adapter": str(tmp_path / "trained"),
        "config": {
            "r": 8, "lora_alpha": 16, "use_dora": True,
            "target_modules": ["q_proj", "v_proj"],
        },
        "learning_rate": 1e-3,
        "steps": 2,
    }  # fmt: skip
    theirs = peer("train", tmp_path, job, tokens=tokens.astype(mx.int64))
    model, _ = load(smollm)
    attach_adapter(model, from_peft(tmp_path / "trained", model))
    model.eval()
    assert largest(theirs["adapted"] - theirs["base"]) > 0.1
    assert_close(model(tokens), to_numpy(theirs["adapted"]), bound=2e-5)
