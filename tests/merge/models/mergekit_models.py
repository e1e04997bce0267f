"""Tiny models, tokenizers and an adapter that the merge files of the tests name.

Values are multiples of a power of two, so that every machine makes the same bits.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HIDDEN, INNER, BLOCKS, HEADS = 16, 24, 2, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]


def _values(rng: np.random.Generator, *shape: int, size: float = 1.0) -> np.ndarray:
    """Values between -size/8 and size/8, with steps of 2^-25: few are equal."""
    top = int(size * 2**22)
    return (rng.integers(-top, top + 1, shape) / 2**25).astype(np.float32)


def _weights(rows: int, *, tied: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // HEADS, HIDDEN),
        "self_attn.v_proj": (HIDDEN // HEADS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    weights = {
        f"model.layers.{block}.{name}.weight": _values(rng, *shape)
        for block in range(BLOCKS)
        for name, shape in shapes.items()
    }
    weights["model.norm.weight"] = 1 + _values(rng, HIDDEN)
    weights["model.embed_tokens.weight"] = _values(rng, 300, HIDDEN)[:rows]
    if not tied:
        weights["lm_head.weight"] = _values(rng, 300, HIDDEN)[:rows]
    return weights


def _tokenizer(folder: Path, words: list[str], specials: list[str], seed: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if seed:
        np.random.default_rng(seed).shuffle(alphabet)
    vocabulary = {token: i for i, token in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_model(
    folder: Path,
    seed: int,
    *,
    words: tuple[str, ...] = (),
    specials: tuple[str, ...] = tuple(SPECIALS),
    order: int = 0,
    spare: int = 0,
    tied: bool = True,
) -> None:
    """A model near that of seed 0; `spare` rows of the embedding have no token."""
    folder.mkdir()
    _tokenizer(folder, list(words), list(specials), order)
    tokens = 256 + len(words) + len(specials)
    rows = tokens + spare
    weights, rng = _weights(rows, tied=tied), np.random.default_rng(seed)
    for name in sorted(weights):
        if seed:
            weights[name] = weights[name] + _values(
                rng, *weights[name].shape, size=0.125
            )
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "vocab_size": rows,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "eos_token_id": tokens - 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    arrays = {name: mx.array(value) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})


def make_lora(folder: Path) -> None:
    """A LoRA adapter of PEFT's, of rank 2 and scale 2."""
    folder.mkdir(parents=True)
    rng, tensors = np.random.default_rng(11), {}
    for block in range(BLOCKS):
        path = f"base_model.model.model.layers.{block}.self_attn.q_proj"
        tensors[f"{path}.lora_A.weight"] = mx.array(_values(rng, 2, HIDDEN))
        tensors[f"{path}.lora_B.weight"] = mx.array(_values(rng, HIDDEN, 2))
    mx.save_safetensors(
        str(folder / "adapter_model.safetensors"), tensors, {"format": "pt"}
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "A",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_all(folder: Path) -> None:
    """Every model and adapter that the files name, in one folder."""
    for seed, name in enumerate(("BASE", "A", "B", "C")):
        make_model(folder / name, seed)
    more = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool|>")
    words = ("hello", "zebra")
    make_model(folder / "V", 4, words=words, specials=more, order=3)
    make_model(folder / "X", 8, words=words, specials=more, order=4, tied=False)
    more = (*SPECIALS, "<|end_of_turn|>")
    make_model(folder / "W", 5, words=("hello",), specials=more)
    make_model(folder / "P", 6, spare=4)
    make_lora(folder / "some" / "lora")
