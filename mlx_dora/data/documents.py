"""Attention in packed rows, in which each document sees only itself.

Where a model calls mlx-lm's attention function, each document gets a causal call of its
own: no mask is built, and the memory of the scores is that of the documents alone.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

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


# Those that compute attention themselves, and so need a mask.
MASKED = ("gemma2",)

_ATTENTION = "scaled_dot_product_attention"  # mlx-lm's, as its model files import it
_redirected: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class DocumentMask:
    """Stands for the mask on its way through a model whose attention does not need it.

    Args:
        window: Number of tokens that a token sees, itself included; None for all
            tokens of its document up to itself.
    """

    window: int | None


class DocumentCache:
    """A layer's cache that stores no keys or values, only where documents lie.

    mlx-lm's models ask their cache for the attention mask, and pass it with the mask to
    mlx-lm's attention function, which `document_caches` redirects here. A token attends
    to the earlier tokens of its own document (within the layer's window, if it has
    one).

    Args:
        documents: Document number of each token. Shape ``(rows, length)``.
        starts: For each row, the places where another document starts than before; None
            to build masks of shape ``(rows, 1, length, length)`` instead of one call
            per document.
    """

    offset = 0  # position of the row's first token

    def __init__(
        self, documents: mx.array, starts: list[list[int]] | None = None
    ) -> None:
        self._documents = documents
        self._starts = starts

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | DocumentMask:
        """Mask of the keys that each query sees: its description or an array.

        The array is bool, of shape ``(rows, 1, length, length)``.
        """
        assert self._documents.shape[1] == N
        if self._starts is not None:
            assert not return_array
            return DocumentMask(window=window_size)
        seen = _causal(N, window_size)
        same = self._documents[:, :, None] == self._documents[:, None]
        return (seen & same)[:, None]

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return the keys and values unchanged."""
        return keys, values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: DocumentMask,
    ) -> mx.array:
        """Attention of every document to itself, in a call of its own.

        Args:
            queries: Shape ``(rows, heads, length, width)``.
            keys: Shape ``(rows, groups, length, width)``.
            values: Shape ``(rows, groups, length, width)``.
            scale: Factor of the scores.
            mask: From `make_mask`.
        """
        assert self._starts is not None
        count = len(self._starts)
        # The gradient of a split is one concatenation; that of slices, a sum of arrays
        # of the whole row, one per document.
        parts = (mx.split(a, count) for a in (queries, keys, values))
        rows = []
        for starts, *row in zip(self._starts, *parts, strict=True):
            q, k, v = (mx.split(a, starts, axis=2) for a in row)
            done = [
                _causal_call(*document, scale, mask.window)
                for document in zip(q, k, v, strict=True)
            ]
            rows.append(mx.concatenate(done, axis=2))
        return mx.concatenate(rows)


def _causal_call(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    window: int | None,
) -> mx.array:
    length = queries.shape[2]
    is_narrow = window is not None and window < length
    return mx.fast.scaled_dot_product_attention(
        queries,
        keys,
        values,
        scale=scale,
        mask=_causal(length, window) if is_narrow else "causal",
    )


def _causal(length: int, window: int | None) -> mx.array:
    place = mx.arange(length)
    ago = place[:, None] - place[None]
    seen = ago >= 0
    return seen if window is None else seen & (ago < window)


def document_caches(model: nn.Module, documents: mx.array) -> list[DocumentCache]:
    """One cache per block, to pass to the model as its ``cache``.

    Args:
        model: A model that `check_packable` accepts.
        documents: Document number of each token. Shape ``(rows, length)``. While it is
            traced, as under `mx.compile`, its values are unknown, and masks are built.
    """
    blocks: Any = model.layers
    starts = _starts(documents) if redirect_attention(model) else None
    return [DocumentCache(documents, starts)] * len(blocks)


def _starts(documents: mx.array) -> list[list[int]] | None:
    try:
        numbers = np.array(documents)
    except ValueError:  # traced
        return None
    return [(np.flatnonzero(np.diff(row)) + 1).tolist() for row in numbers]


def redirect_attention(model: nn.Module) -> bool:
    """Let the attention function of a model's files ask a `DocumentCache`, if given.

    The function stays replaced; with any other cache it does what it did.

    Returns:
        Whether all of the model's attention goes through that function.
    """
    if type(model).__module__.rpartition(".")[2] in MASKED:
        return False
    blocks: Any = model.layers
    homes = {type(part).__module__ for block in blocks for part in block.modules()}
    for home in homes:
        file = sys.modules[home]
        is_host = home.startswith("mlx_lm.models.") and _ATTENTION in vars(file)
        if is_host and home not in _redirected:
            _redirected.add(home)
            _redirect(file)
    return True


def _redirect(file: ModuleType) -> None:
    plain: Callable[..., mx.array] = getattr(file, _ATTENTION)

    @wraps(plain)
    def attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        *args: Any,
        **kwargs: Any,
    ) -> mx.array:
        if isinstance(kwargs.get("mask"), DocumentMask):
            return cache.attend(queries, keys, values, *args, **kwargs)
        return plain(queries, keys, values, cache, *args, **kwargs)

    setattr(file, _ATTENTION, attention)


def mask_bytes(model: nn.Module, rows: int, length: int) -> int:
    """Bytes of the mask of packed rows in a model; 0 if it needs none."""
    return 0 if redirect_attention(model) else rows * length**2


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
