"""Layouts of a layer's ``lora_a`` and ``lora_b``, which are those of mlx-lm's files.

The equations use A ``(in, r)`` and B ``(r, out)`` for a weight ``(out, in)``. Linear
layers store these; embeddings and stacks of matrices use other layouts.
"""

from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.matrix.weight import weight_of

Layout = Literal["linear", "embedding", "stack"]
"""How an adapter stores its factors.

- ``linear``: ``lora_a`` ``(in, r)``, ``lora_b`` ``(r, out)``.
- ``embedding``: ``lora_a`` ``(num_embeddings, r)``, the output's side; ``lora_b``
  ``(r, dims)``.
- ``stack``: ``lora_a`` ``(n, r, in)``, ``lora_b`` ``(n, out, r)``, as in mlx-lm's
  experts.
"""


def rearranged(
    layout: Layout, lora_a: mx.array, lora_b: mx.array
) -> tuple[mx.array, mx.array]:
    """Convert stored factors to A and B, or back; the function is its own inverse."""
    if layout == "embedding":
        return lora_b.T, lora_a.T
    if layout == "stack":
        return lora_a.swapaxes(-1, -2), lora_b.swapaxes(-1, -2)
    return lora_a, lora_b


def layout_of(module: nn.Module, stacked: int) -> Layout:
    """Return the layout of a module's adapter.

    Args:
        module: The module.
        stacked: Number of axes of its weight before the last two: 0 or 1.
    """
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return "embedding"
    return "stack" if stacked else "linear"


def leaf_shapes(module: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's adapter of this rank, in mlx-lm's layout."""
    *experts, rows, width = weight_of(module).shape
    if experts:
        return {
            "lora_a": (*experts, rank, width),
            "lora_b": (*experts, rows, rank),
            "m": (*experts, rows),
        }
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return {"lora_a": (rows, rank), "lora_b": (rank, width), "m": (rows,)}
    return {"lora_a": (width, rank), "lora_b": (rank, rows), "m": (rows,)}
