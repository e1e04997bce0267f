"""Converts the tokenizer in a GGUF's metadata to files that transformers reads."""

import json
from collections.abc import Mapping
from typing import Any

from mlx_dora.errors import DoRAError

_CONTROL = 3  # GGUF's token type of special tokens


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return ``tokenizer.json`` and ``tokenizer_config.json`` with the chat template.

    Raises:
        DoRAError: If the tokenizer is not of SmolLM2's kind, byte-level BPE that splits
            digits.
    """
    kind = tuple(metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != ("gpt2", "smollm"):
        raise DoRAError(
            f"the GGUF's tokenizer is {kind}; the demo reads ('gpt2', 'smollm')."
        )
    return {
        "tokenizer.json": json.dumps(_tokenizer(metadata), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_settings(metadata), indent=2),
    }


def _tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [pair.split(" ") for pair in metadata["tokenizer.ggml.merges"]],
        },
    }


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    def token(role: str) -> str:
        index = metadata[f"tokenizer.ggml.{role}_token_id"]
        return metadata["tokenizer.ggml.tokens"][index]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "chat_template": metadata["tokenizer.chat_template"],
    }
