"""Attention masks for packed rows, in which each document sees only itself."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError

# Model files of mlx-lm whose only positional encoding is RoPE (relative, so that the
# position of a document in its row affects rounding only), and whose tokens interact
# only in attention, under the mask of `create_attention_mask`. Each is tested.
PACKABLE = (
    "cohere",
    "cohere2",
    "exaone",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "granite",
    "helium",
    "internlm2",
    "llama",
    "minicpm",
    "mixtral",
    "nemotron",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)


class DocumentCache:
    """A layer's cache that stores no keys or values, only document numbers.

    mlx-lm's models ask their cache for the attention mask. The mask of this cache lets
    a token attend to the earlier tokens of its own document (within the layer's
    window, if it has one).

    Args:
        documents: Document number of each token. Shape ``(rows, length)``.
    """

    offset = 0  # position of the row's first token

    def __init__(self, documents: mx.array) -> None:
        self._documents = documents

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Mask of the keys that each query sees, bool ``(rows, 1, length, length)``."""
        assert self._documents.shape[1] == N
        place = mx.arange(N)
        ago = place[:, None] - place[None]
        seen = ago >= 0
        if window_size is not None:
            seen = seen & (ago < window_size)
        same = self._documents[:, :, None] == self._documents[:, None]
        return (seen & same)[:, None]

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return the keys and values unchanged."""
        return keys, values


def document_caches(model: nn.Module, documents: mx.array) -> list[DocumentCache]:
    """One cache per block, to pass to the model as its ``cache``."""
    cache = DocumentCache(documents)
    blocks: Any = model.layers
    return [cache] * len(blocks)


def check_packable(model: nn.Module) -> None:
    """Refuse a model that would mix the documents of a packed row.

    Raises:
        DoRAError: If the model's architecture is not in `PACKABLE`.
    """
    home, _, name = type(model).__module__.rpartition(".")
    if home == "mlx_lm.models" and name in PACKABLE:
        return
    raise DoRAError(
        f"packing is not known to keep documents apart in {name}: models with a "
        "recurrent state, absolute positions or their own masks mix them. Packing "
        f"is tested for {', '.join(PACKABLE)}; train without packing."
    )
