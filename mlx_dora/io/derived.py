"""Stored tensors that follow from others: rotary buffers and copies of tied heads.

Older checkpoints store them; model classes compute them, and drop what is stored.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_BUFFER = re.compile(
    r"(?:^|\.)rotary(?:_pos)?_emb\.(?:inv_freq|cos_cached|sin_cached)$"
)
_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight")
_BEFORE = re.compile(r"(?:^|\.)(?:embed(?!_out)|tok_embed|word_embed|wte\.|wpe\.)")


def is_buffer(name: str) -> bool:
    """Whether a tensor is a table of rotary frequencies, made from the config."""
    return _BUFFER.search(name) is not None


def is_before_blocks(name: str) -> bool:
    """Whether a tensor is an input embedding, which stands before the blocks."""
    return _BEFORE.search(name) is not None


def head_and_embedding(names: Iterable[str]) -> tuple[str, str] | None:
    """Names of a model's output head and of the input embedding it can be tied to.

    Args:
        names: Names of all tensors of a model. The head need not be among them: it is
            named as it would be if it were stored.

    Returns:
        None if the embedding is not one of the known names.
    """
    known = [name for name in names if name.endswith((_HEAD, *_EMBEDDINGS))]
    embeddings = [name for name in known if name.endswith(_EMBEDDINGS)]
    if len(embeddings) != 1:
        return None
    heads = [name for name in known if name.endswith(_HEAD)]
    prefix = re.match(r"(?:.*language_model\.)?", embeddings[0])
    head = heads[0] if heads else f"{prefix[0] if prefix else ''}{_HEAD}"
    return head, embeddings[0]


def ties_embeddings(config: Mapping[str, Any]) -> bool | None:
    """Whether a model's config ties the head to the embedding; None if it is silent."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            ties = part.get("tie_word_embeddings")
            if isinstance(ties, bool):
                return ties
    return None
