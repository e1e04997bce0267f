"""The order of q's and k's rows in llama.cpp, and back.

llama.cpp's rotary embedding of the llama family rotates neighboring rows of a head;
mlx-lm's and transformers' rotates row i with row i + half. Whole rows move, so packed
weights, scales and biases move in the same way.
"""

import mlx.core as mx


def pairs_order(rows: mx.array, heads: int) -> mx.array:
    """Return rows in llama.cpp's order. Shape ``(out, ...)``, as given."""
    out, rest = rows.shape[0], rows.shape[1:]
    halves = rows.reshape(heads, 2, out // heads // 2, *rest)
    return halves.swapaxes(1, 2).reshape(out, *rest)


def halves_order(rows: mx.array, heads: int) -> mx.array:
    """Return rows of llama.cpp in mlx-lm's order; the inverse of `pairs_order`."""
    out, rest = rows.shape[0], rows.shape[1:]
    pairs = rows.reshape(heads, out // heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(out, *rest)
