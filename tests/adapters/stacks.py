"""Tiny models with stacks of matrices: experts, and heads of latent attention."""

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_dora.adapters.adapter import Adapter, take_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.surgery import (
    FineTuneType,
    adapter_layers,
    apply_layers,
    remove_dora,
)
from tests.checks import to_numpy
from tests.conftest import write_tiny_tokenizer
from tests.layers.oracle import dense_weight

VOCABULARY = 320
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
        "vocab_size": VOCABULARY,
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
        "vocab_size": VOCABULARY,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
    },
}
HEADS = ("self_attn.embed_q", "self_attn.unembed_out")
EXPERTS = {
    "qwen3_moe": ("mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj"),
    "mixtral": ("block_sparse_moe.switch_mlp.up_proj",),
    "deepseek_v3": ("mlp.switch_mlp.gate_proj", *HEADS),
}
TOKENS = mx.array([[(7 * i + 3 * j) % 64 for j in range(24)] for i in range(4)])


def make_model(kind: str, bits: int | None = None) -> nn.Module:
    """Return a random model in eval mode, packed in groups of 32 if `bits` is set."""
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(MODELS[kind]))
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    mx.eval(model.parameters())
    return model.eval()


def write_folder(folder: Path, kind: str, bits: int | None = None) -> Path:
    """Write the same model as a folder that `mlx_lm.load` reads."""
    folder.mkdir()
    weights: Any = dict(tree_flatten(make_model(kind, bits).parameters()))
    file = str(folder / "model.safetensors")
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    config = dict(MODELS[kind])
    if bits is not None:
        config["quantization"] = {"group_size": 32, "bits": bits}
    (folder / "config.json").write_text(json.dumps(config))
    write_tiny_tokenizer(folder)
    return folder


def make_adapter(
    model: nn.Module,
    seed: int,
    keys: tuple[str, ...],
    *,
    rank: int = 3,
    scale: float = 2.0,
    kind: FineTuneType = "dora",
) -> Adapter:
    """Return an adapter as if trained, with different values for each matrix.

    The model is unchanged.
    """
    mx.random.seed(seed)
    model.eval()
    config = DoRAConfig(rank=rank, scale=scale, num_layers=-1, keys=keys)
    apply_layers(model, config, kind)
    for _, layer in adapter_layers(model):
        layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape)
        if "m" in layer:
            layer.m = layer.m * (1 + 0.05 * mx.random.normal(layer.m.shape))
    adapter = take_adapter(model)
    mx.eval(adapter.tensors)
    remove_dora(model)
    return adapter


def dense_stack(model: nn.Module, adapter: Adapter, path: str) -> np.ndarray:
    """Return W' of every matrix in a stack, by Eq. 5 of DoRA in float64."""
    rows = dense_weight(dict(model.named_modules())[path])
    if f"{path}.lora_a" not in adapter.tensors:
        return rows
    a, b = (
        to_numpy(adapter.tensors[f"{path}.{leaf}"]) for leaf in ("lora_a", "lora_b")
    )
    rows = rows + adapter.config.scale * (b @ a)
    if f"{path}.m" not in adapter.tensors:
        return rows
    m = to_numpy(adapter.tensors[f"{path}.m"])
    return m[..., None] * rows / np.linalg.norm(rows, axis=-1, keepdims=True)
