"""Every model class that mlx-lm ships, built tiny at random from its own arguments.

Sizes are set by the names that configurations share; what a class does not know it is
not given. A class that cannot be built so is told with what it raised.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import typing
from typing import Any

import mlx.core as mx
import mlx.nn as nn

VOCABULARY = 64
LAYERS = 4
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "model_dim": 64,
    "hidden_dim": 128,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "n_inner": 128,
    "block_ff_dim": 128,
    "num_hidden_layers": LAYERS,
    "n_layers": LAYERS,
    "n_layer": LAYERS,
    "num_layers": LAYERS,
    "num_transformer_layers": LAYERS,
    "num_attention_heads": 4,
    "n_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "n_kv_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "attention_head_dim": 16,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "block_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "sliding_window": 16,
    "sliding_window_size": 16,
    "sliding_window_pattern": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_scaling": None,
    "state_size": 16,
    "conv_kernel": 4,
    "time_step_rank": 8,
    "ssm_state_size": 16,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "conv_L_cache": 3,
    "query_pre_attn_scalar": 16,
    "image_token_id": 1,
    "image_token_index": 1,
}
_FULL = ["full_attention"] * LAYERS
_MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "rope_theta": 10000.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "llama_4_scaling_beta": 0.1,
}
_BY_TYPE = {
    name: {"rope_type": "default", "rope_theta": 10000.0}
    for name in ("full_attention", "sliding_attention")
}
# What single classes want beside the common sizes.
_OWN: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": _MIXED},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": _YARN},
    "exaone4": {"sliding_window_pattern": "LLLG", "rope_scaling": {"type": "default"}},
    "exaone_moe": {
        "layer_types": _MIXED,
        "mlp_layer_types": ["dense", "sparse"] * (LAYERS // 2),
        "is_moe_layer": [False, True] * (LAYERS // 2),
    },
    "gear": {"layer_types": _FULL},
    "gemma3n": {"layer_types": _MIXED, "num_kv_shared_layers": 0},
    "gemma4": {"layer_types": _MIXED, "num_kv_shared_layers": 0},
    "gemma4_text": {"layer_types": _MIXED, "num_kv_shared_layers": 0},
    "glm_moe_dsa": {
        "topk_method": "noaux_tc",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "gptj": {"rotary_dim": 16},
    "hunyuan": {"rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}},
    "jamba": {"layers_block_type": ["mamba", "attention"] * (LAYERS // 2)},
    "lfm2": {
        "block_dim": 64,
        "layer_types": ["conv", "full_attention"] * (LAYERS // 2),
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "llama4": {"num_experts_per_tok": 1},
    "llama4_text": {"num_experts_per_tok": 1, "no_rope_layers": [1] * LAYERS},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "longcat_flash_ngram": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mamba2": {"time_step_limit": (0.0, 1000.0), "num_heads": 8, "n_groups": 1},
    "mellum": {"layer_types": _MIXED, "rope_parameters": _BY_TYPE},
    "phixtral": {"rotary_dim": 16},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * (LAYERS // 2),
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1] * (LAYERS // 2),
        "moe_layer_freq": [0, 1] * (LAYERS // 2),
        "topk_method": "noaux_tc",
    },
    "minicpm3": {"rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8,
                                  "type": "longrope",
                                  "original_max_position_embeddings": 64}},
    "ministral3": {"rope_parameters": _YARN, "layer_types": _FULL},
    "mistral4": {"rope_parameters": _YARN},
    "muse_spark": {"layer_types": _MIXED},
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "M"]},
    "openelm": {
        "num_query_heads": [4] * LAYERS,
        "num_kv_heads": [2] * LAYERS,
        "ffn_multipliers": [2.0] * LAYERS,
        "ffn_dim_divisor": 8,
    },
    "plamo": {"num_attention_heads": 8, "n_shared_head": 2},
    "qwen": {"kv_channels": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "spark2_5": {
        "layer_types": _MIXED,
        "rope_parameters": _BY_TYPE,
    },
    "step3p5": {"moe_top_k": 2, "moe_num_experts": 4},
}  # fmt: skip
_NESTED = ("text_config", "llm_config", "language_config")


def model_names() -> list[str]:
    """Modules of mlx_lm.models with a model and its arguments, in order.

    The others are parts that models share.
    """
    import mlx_lm.models

    found = []
    for entry in pkgutil.iter_modules(mlx_lm.models.__path__):
        try:
            module = importlib.import_module(f"mlx_lm.models.{entry.name}")
        except (ImportError, SystemExit):  # olmo wants a package of its own
            continue
        if hasattr(module, "Model") and hasattr(module, "ModelArgs"):
            found.append(entry.name)
    return found


def build(name: str) -> nn.Module:
    """A tiny random model, evaluated, in eval mode.

    Raises:
        Exception: Whatever the class does with arguments it cannot take.
    """
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    model = module.Model(_arguments(module.ModelArgs, name))
    mx.eval(model.parameters())
    return model.eval()


def _arguments(kind: Any, name: str) -> Any:
    if "__dataclass_fields__" not in vars(kind):
        return kind.from_dict(dict(_SIZES) | {"model_type": name})
    values: dict[str, Any] = {}
    own = _OWN.get(name, {})
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        if field.name in own:
            values[field.name] = own[field.name]
        elif field.name in ("layer_types", "attention_layers"):
            continue
        elif field.name in _NESTED:
            values[field.name] = _nested(name) | {"model_type": name}
        elif field.name in _SIZES:
            values[field.name] = _SIZES[field.name]
        elif field.name == "model_type":
            values[field.name] = name
        elif _is_required(field):
            values[field.name] = _default(field.type, kind)
    return kind.from_dict(values) if hasattr(kind, "from_dict") else kind(**values)


def _nested(name: str) -> dict[str, Any]:
    module = importlib.import_module(f"mlx_lm.models.{name}")
    for attribute in ("TextArgs", "TextConfig", "TextModelArgs"):
        if hasattr(module, attribute):
            made = _arguments(getattr(module, attribute), name)
            return {k: v for k, v in vars(made).items() if not k.startswith("_")}
    return dict(_SIZES)


def _is_required(field: Any) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _default(kind: Any, owner: Any) -> Any:
    if isinstance(kind, str):
        kind = typing.get_type_hints(owner).get(kind, kind)
    options = [one for one in typing.get_args(kind) if one is not type(None)]
    chosen = options[0] if typing.get_origin(kind) is typing.Union else kind
    origin = typing.get_origin(chosen) or chosen
    plain = {int: 4, float: 1.0, bool: False, str: "silu", list: [], dict: {}}
    if inspect.isclass(origin):
        return plain.get(origin)
    return None
