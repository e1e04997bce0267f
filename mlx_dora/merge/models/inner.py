"""Inner products of rows, summed in float64."""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import mlx.core as mx
import numpy as np

# Number of products to sum in float32; these sums are added in float64. Summing a
# million in float32 gave a slerp of whole tensors an error of 7e-5.
_SPAN = 1024


def inner_products(blocks: Sequence[mx.array]) -> np.ndarray:
    """Inner products of the rows of each pair. Shape ``(rows, N, N)``, float64."""
    count = len(blocks)
    mx.eval(blocks)
    views = [np.array(block, copy=False) for block in blocks]
    inner = np.empty((len(views[0]), count, count))
    with np.errstate(over="ignore", invalid="ignore"):  # callers check for them
        for i, k in combinations_with_replacement(range(count), 2):
            inner[:, i, k] = inner[:, k, i] = _products(views[i], views[k])
    return inner


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    rows, width = a.shape
    if rows == 1 and width > _SPAN:
        spans, left = divmod(width, _SPAN)
        head = [x[0, : width - left].reshape(spans, _SPAN) for x in (a, b)]
        tail = [x[:, width - left :] for x in (a, b)]
        return _products(*head).sum(keepdims=True) + _products(*tail)
    total = np.zeros(rows)
    for first in range(0, width, _SPAN):
        index = slice(first, first + _SPAN)
        total += np.einsum("jw,jw->j", a[:, index], b[:, index])
    return total
