"""How a layer's ``lora_a`` and ``lora_b`` are laid out, as mlx-lm has them on disk.

Mathematics wants A ``(in, r)`` and B ``(r, out)`` for a weight ``(out, in)``. Linear
layers store just that; embeddings and stacks of matrices do not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

Pair = tuple[mx.array, mx.array]
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to lay out the factors.

    Attributes:
        turn: From stored ``(lora_a, lora_b)`` to A and B, and back: its own inverse.
        shapes: Of the stored factors, for a weight's shape and a rank.
        fan_axis: Axis of the weight's shape that scales the random start of `lora_a`.
    """

    turn: Callable[[mx.array, mx.array], Pair]
    shapes: Callable[[tuple[int, ...], int], Shapes]
    fan_axis: int = -1


LINEAR = Layout(
    turn=lambda lora_a, lora_b: (lora_a, lora_b),
    shapes=lambda weight, r: ((weight[1], r), (r, weight[0])),
)
"""``lora_a`` ``(in, r)``, ``lora_b`` ``(r, out)``."""

EMBEDDING = Layout(
    turn=lambda lora_a, lora_b: (lora_b.T, lora_a.T),
    shapes=lambda weight, r: ((weight[0], r), (r, weight[1])),
    fan_axis=0,
)
"""``lora_a`` ``(num_embeddings, r)``, the output's side; ``lora_b`` ``(r, dims)``."""

STACK = Layout(
    turn=lambda lora_a, lora_b: (lora_a.swapaxes(-1, -2), lora_b.swapaxes(-1, -2)),
    shapes=lambda weight, r: (
        (weight[0], r, weight[2]),
        (weight[0], weight[1], r),
    ),
)
"""``lora_a`` ``(n, r, in)``, ``lora_b`` ``(n, out, r)``, as in mlx-lm's experts."""


def layout_of(module: nn.Module, lora_a: mx.array) -> Layout:
    """How the factors of an adapter of `module`, of which `lora_a` is one, lie."""
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return EMBEDDING
    return STACK if lora_a.ndim > 2 else LINEAR
