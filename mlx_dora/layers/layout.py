"""Layouts of a layer's ``lora_a`` and ``lora_b``, which are those of mlx-lm's files.

The equations use A ``(in, r)`` and B ``(r, out)`` for a weight ``(out, in)``. Linear
layers store these; embeddings and stacks of matrices use other layouts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

Pair = tuple[mx.array, mx.array]
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of the factors.

    Attributes:
        turn: Converts stored ``(lora_a, lora_b)`` to A and B, and back; it is its own
            inverse.
        shapes: Returns the shapes of the stored factors for a weight's shape and a
            rank.
        fan_axis: Axis of the weight whose size scales the initial values of `lora_a`.
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


def layout_of(module: nn.Module, stacked: int) -> Layout:
    """Return the layout of a module's adapter.

    Args:
        module: The module.
        stacked: Number of axes of its weight before the last two: 0 or 1.
    """
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return EMBEDDING
    return STACK if stacked else LINEAR
