"""Classes whose modules transformers names otherwise: the table, and PEFT on them."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.adapters.peft import from_peft
from mlx_dora.adapters.peft_classes import DIFFERENT, SAME
from mlx_dora.adapters.peft_names import names_of
from mlx_dora.adapters.peft_write import to_peft
from tests.adapters.training import TOKENS, train
from tests.compat.peer_process import run_peer
from tests.compat.tiny_models import build

pytestmark = pytest.mark.slow

TEXT = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "gemma3": (
        {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
        ("self_attn.q_proj", "mlp.down_proj"),
    ),
    "gpt_neox": (
        {**TEXT, "rotary_pct": 0.25},
        ("attention.query_key_value", "mlp.dense_4h_to_h"),
    ),
    "gpt2": (
        {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc"),
    ),
    "gptj": (
        {
            "vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4,
            "n_positions": 64, "rotary_dim": 4, "tie_word_embeddings": False,
        },
        ("attn.q_proj", "mlp.fc_out"),
    ),
    "qwen3_5": (
        {"text_config": {**TEXT, "num_hidden_layers": 4}},
        ("mlp.down_proj",),
    ),
}  # fmt: skip


def peer(name: str, at: Path, job: dict[str, Any]) -> dict:
    return run_peer(
        "peft_peer.py", name, at / name, job, {"tokens": TOKENS.astype(mx.int64)}
    )


def largest(value: mx.array) -> float:
    return mx.max(mx.abs(value)).item()  # pyright: ignore[reportReturnType]


def make(name: str, at: Path) -> Path:
    config = {"model_type": name, **MODELS[name][0]}
    peer("make", at, {"config": config, "out": str(at / "base")})
    return at / "base"


@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_the_same_with_our_adapter(name: str, tmp_path: Path) -> None:
    base = make(name, tmp_path)
    model = load_lazily(base)
    plain = model(TOKENS)
    ours = train(model, DoRAConfig(rank=3, num_layers=-1, keys=MODELS[name][1]))
    save_adapter(model, tmp_path / "adapter", base_model=str(base))
    to_peft(tmp_path / "adapter", tmp_path / "peft")
    job = {"model": str(base), "adapter": str(tmp_path / "peft")}
    theirs = peer("logits", tmp_path, job)
    drift = largest(theirs["base"] - plain)  # what the libraries differ by anyway
    assert largest(theirs["adapted"] - theirs["base"]) > max(0.01, 10 * drift)
    assert largest(theirs["adapted"] - ours) < max(1e-4, 2 * drift)
    first, again = load_adapter(tmp_path / "adapter"), from_peft(tmp_path / "peft")
    assert again.config == first.config
    assert all(mx.array_equal(again.tensors[n], v) for n, v in first.tensors.items())


@pytest.mark.parametrize("name", MODELS)
def test_we_compute_the_same_with_pefts_adapter(name: str, tmp_path: Path) -> None:
    base = make(name, tmp_path)
    keys = [key.rpartition(".")[2] for key in MODELS[name][1]]
    config = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": keys}
    job = {
        "model": str(base), "adapter": str(tmp_path / "peft"), "config": config,
        "learning_rate": 0.02, "steps": 3,
    }  # fmt: skip
    theirs = peer("train", tmp_path, job)
    adapter = from_peft(tmp_path / "peft", base)
    save_adapter(adapter, tmp_path / "adapter")
    drift = largest(theirs["base"] - load_lazily(base)(TOKENS))
    model = load_lazily(base)
    from mlx_dora.adapters.attach import attach_adapter

    attach_adapter(model, load_adapter(tmp_path / "adapter"))
    model.eval()
    assert largest(theirs["adapted"] - theirs["base"]) > max(0.01, 10 * drift)
    assert largest(model(TOKENS) - theirs["adapted"]) < max(1e-4, 2 * drift)


FOUR = {"num_hidden_layers": 4}
SECOND_DENSE = {**FOUR, "first_k_dense_replace": 1}
CONV = {**FOUR, "layer_types": ["conv", "full_attention"] * 2}
# What transformers needs to build a class as our tiny one is built.
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": SECOND_DENSE,
    "dots1": {**SECOND_DENSE, "n_routed_experts": 4, "n_shared_experts": 1},
    "ernie4_5_moe": FOUR,
    "gemma4": {
        "text_config": {
            **FOUR, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
            "moe_intermediate_size": 32,
        }
    },
    "gemma4_text": {
        **FOUR, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "granitemoehybrid": {**FOUR, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {**FOUR, "model_type": "hunyuan_v1_moe", "head_dim": 64},
    "hunyuan_v1_dense": {**FOUR, "head_dim": 64},
    "lfm2": CONV,
    "lfm2-vl": {"model_type": "lfm2_vl", "text_config": CONV},
    "lfm2_moe": CONV,
    "llama4": {"text_config": {**FOUR, "interleave_moe_layer_step": 2}},
    "llama4_text": {**FOUR, "interleave_moe_layer_step": 2},
    "minimax": {"model_type": "minimax_m2"},
    "mistral4": SECOND_DENSE,
    "nemotron": {**FOUR, "num_key_value_heads": 8, "head_dim": 64},
    "solar_open": SECOND_DENSE,
}  # fmt: skip
# Modules that only our tiny model has: its sizes ask for them.
ONLY_TINY = {"mimo_v2_flash": "shared_experts", "qwen3_5": "shared_expert"}
NOT_BUILT = {
    "dbrx": "transformers 5.24 cannot build its default",
    "gemma3n": "its vision tower needs timm",
    "pixtral": "transformers has the vision tower alone; as mistral3",
}


def test_every_linear_layer_is_where_the_table_says(tmp_path: Path) -> None:
    kinds = [
        kind
        for kind in sorted({*SAME, *DIFFERENT} - NOT_BUILT.keys())
        if (names := names_of(kind)) is not None and names.refusal is None
    ]
    classes = {kind: {"model_type": kind, **SETTINGS.get(kind, {})} for kind in kinds}
    out = tmp_path / "linears.json"
    peer("linears", tmp_path, {"classes": classes, "out": str(out)})
    theirs = json.loads(out.read_text())
    lost = {}
    for kind in kinds:
        names = names_of(kind)
        assert names is not None
        paths = [p for p, m in build(kind).named_modules() if isinstance(m, nn.Linear)]
        assert paths
        lost[kind] = {
            named
            for path in paths
            if not names.is_missing(path)
            and ONLY_TINY.get(kind, "no such") not in path
            and (named := re.sub(r"\.\d+(?=\.|$)", ".#", names.to_transformers(path)))
            not in theirs[kind]
        }
        assert all(names.to_mlx(names.to_transformers(p)) == p for p in paths), kind
    assert {kind: found for kind, found in lost.items() if found} == {}
