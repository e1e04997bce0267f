"""Several documents in one row, each of which sees only itself."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError

# Model files of mlx-lm in which a token's place enters by RoPE alone (relative: where
# in a row a document starts changes nothing but rounding), and tokens meet in attention
# alone, under the mask that `create_attention_mask` gives. Each is tested.
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
    """Takes a cache's place in a layer: keeps nothing, and knows the documents.

    mlx-lm's models ask their cache for the attention mask; this one's lets a token see
    what is before it in its own document (and in the layer's window, if it has one).

    Args:
        documents: Number of each token's document. Shape ``(rows, length)``.
    """

    offset = 0  # of the row's first position

    def __init__(self, documents: mx.array) -> None:
        self._documents = documents

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Which keys each query sees. Booleans ``(rows, 1, length, length)``."""
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
        """Hand back what a layer would have stored."""
        return keys, values


def document_caches(model: nn.Module, documents: mx.array) -> list[DocumentCache]:
    """One cache a block, to be passed to the model as its ``cache``."""
    cache = DocumentCache(documents)
    blocks: Any = model.layers
    return [cache] * len(blocks)


def check_packable(model: nn.Module) -> None:
    """Refuse a model whose documents could not be kept apart in a packed row.

    Raises:
        DoRAError: Naming the model's architecture, unless it is one of `PACKABLE`.
    """
    home, _, name = type(model).__module__.rpartition(".")
    if home == "mlx_lm.models" and name in PACKABLE:
        return
    raise DoRAError(
        f"packing is not known to keep documents apart in {name}: models with a "
        "recurrent state, absolute positions or masks of their own mix them. It is "
        f"tested for {', '.join(PACKABLE)}; train without packing."
    )
