"""Reads a llama model from a GGUF file as mlx-lm's tensors and ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.export.row_order import halves_order

ModelDtype = Literal["float32", "bfloat16", "float16", "q4"]

_BLOCK = 32  # weights that share a scale in GGUF's Q4_1 and Q8_0

_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


@dataclass(frozen=True, kw_only=True)
class GGUFModel:
    """Tensors by mlx-lm's names, the model's ``config.json``, and GGUF's metadata."""

    tensors: dict[str, mx.array]
    config: dict[str, Any]
    metadata: dict[str, Any]


def read_gguf(path: Path, dtype: ModelDtype) -> GGUFModel:
    """Read a llama GGUF of types F32, F16, Q4_1 and Q8_0.

    Args:
        path: The file.
        dtype: Dtype of the weights. ``"q4"`` keeps GGUF's blocks: affine, group size
            32, 4 bits (8 where the file has 8). Scales and biases become float32, which
            is exact and makes the model compute in float32: on a CPU, MLX multiplies
            float16 blocks about forty times slower.

    Raises:
        DoRAError: If the file is not a GGUF file, or holds another architecture.
    """
    try:
        loaded: Any = mx.load(str(path), format="gguf", return_metadata=True)
    except RuntimeError as error:
        raise DoRAError(
            f"{path} is not a GGUF file that MLX can read: {error}"
        ) from error
    arrays: dict[str, mx.array] = loaded[0]
    metadata = {name: _plain(value) for name, value in loaded[1].items()}
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise DoRAError(
            f"{path} holds a {architecture!r} model; the demo reads 'llama'."
        )
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    tensors: dict[str, mx.array] = {}
    bits: dict[str, int] = {}
    target = mx.float32 if dtype == "q4" else getattr(mx, dtype)
    for stem in sorted({name.rpartition(".")[0] for name in arrays}):
        leaves = {
            leaf: arrays[f"{stem}.{leaf}"]
            for leaf in ("weight", "scales", "biases")
            if f"{stem}.{leaf}" in arrays
        }
        if count := heads.get(stem.rpartition(".")[2]):
            leaves = {leaf: halves_order(rows, count) for leaf, rows in leaves.items()}
        module = _module_name(stem)
        if "scales" in leaves and dtype == "q4":
            bits[module] = _bits(leaves)
            for leaf, value in leaves.items():
                packed = leaf == "weight"
                tensors[f"{module}.{leaf}"] = value if packed else value.astype(target)
        else:
            tensors[f"{module}.weight"] = _dense(leaves).astype(target)
    mx.eval(tensors)
    return GGUFModel(
        tensors=tensors,
        config=_config(metadata, tied="lm_head.weight" not in tensors, dtype=dtype)
        | _quantization(bits),
        metadata=metadata,
    )


def _plain(value: Any) -> Any:
    """Return an array with one element as a number, other values as list or text."""
    if not isinstance(value, mx.array):
        return value
    return value.item() if value.size == 1 else value.tolist()


def _module_name(stem: str) -> str:
    if stem in _TOP_MODULES:
        return _TOP_MODULES[stem]
    _, block, part = stem.split(".")  # blk.<block>.<part>
    return f"model.layers.{block}.{_MODULES[part]}"


def _bits(leaves: Mapping[str, mx.array]) -> int:
    return leaves["weight"].shape[1] * 32 // (leaves["scales"].shape[1] * _BLOCK)


def _dense(leaves: Mapping[str, mx.array]) -> mx.array:
    if "scales" not in leaves:
        return leaves["weight"]
    return mx.dequantize(
        leaves["weight"],
        leaves["scales"].astype(mx.float32),
        leaves["biases"].astype(mx.float32),
        group_size=_BLOCK,
        bits=_bits(leaves),
    )


def _config(
    metadata: Mapping[str, Any], *, tied: bool, dtype: ModelDtype
) -> dict[str, Any]:
    llama = {
        name.removeprefix("llama."): value
        for name, value in metadata.items()
        if name.startswith("llama.")
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["rope.dimension_count"],
        "hidden_act": "silu",
        # The file stores float32, in which 1e-5 is 9.9999997e-06.
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": llama["rope.freq_base"],
        "rope_scaling": None,
        "max_position_embeddings": llama["context_length"],
        "vocab_size": llama["vocab_size"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32" if dtype == "q4" else dtype,
    }


def _quantization(bits: Mapping[str, int]) -> dict[str, Any]:
    """Return mlx-lm's quantization config: 4 bits, and exceptions by module name."""
    if not bits:
        return {}
    main: dict[str, Any] = {"group_size": _BLOCK, "bits": 4, "mode": "affine"}
    others = {
        name: main | {"bits": count} for name, count in bits.items() if count != 4
    }
    return {"quantization": main | others, "quantization_config": main | others}
