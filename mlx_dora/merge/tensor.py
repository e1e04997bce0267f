r"""One tensor of several models, merged: row by row, or as a whole.

``granularity="row"`` is ours: length and direction of each output row apart.
``"tensor"`` is mergekit's: the tensor as one vector, where its slerp interpolates the
vectors as they are, not their directions. The result is float32 and evaluated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.merge import methods
from mlx_dora.merge.directions import combine
from mlx_dora.merge.names import ELEMENTWISE, MEANS

# Elements of one block in float32.
_BLOCK = 1 << 20
# Products summed in float32; more of them are summed in float64. A million in float32
# put a slerp of whole tensors off by 7e-5.
_SPAN = 1024
# mergekit's: where the cosine is above it, slerp interpolates linearly.
_COLLINEAR = 0.9995


@dataclass(frozen=True, kw_only=True)
class TensorSettings:
    """How one tensor is merged.

    Attributes:
        weights: One a model, or one a row and model: ``(N,)`` or ``(rows, N)``.
        density: Share of the entries to keep, one a model; None for 1.
        normalize: Divide by the weights; None for the method's default.
        scale: λ on the merged task vectors.
        seed: Of dare's random numbers.
    """

    weights: np.ndarray
    density: tuple[float, ...] | None = None
    normalize: bool | None = None
    scale: float = 1.0
    seed: int = 0


def merge_tensor(
    method: str,
    base: mx.array | None,
    tensors: Sequence[mx.array],
    settings: TensorSettings,
    granularity: str = "row",
) -> tuple[mx.array, int]:
    """Merge one tensor of N models.

    With a base, ``slerp``, ``karcher`` and ``nmean`` merge the task vectors. A tensor
    with fewer than two axes (norm weights, biases) has no rows: methods of rows take
    the weighted mean there.

    Args:
        method: A method's name.
        base: The base's tensor, or None.
        tensors: N arrays of one shape.
        settings: Of the method, for this tensor.
        granularity: ``"row"`` or ``"tensor"``.

    Returns:
        The merged tensor, and the number of rows whose directions cancel (they keep the
        heaviest model's).

    Raises:
        DoRAError: If the method needs a base, or weights cannot be used.
    """
    if method in ELEMENTWISE or method == "task_arithmetic":
        if base is None:
            raise DoRAError(f"{method} merges changes of a base: give the base.")
        return _merge_changes(method, base, tensors, settings), 0
    by_row = granularity == "row" and tensors[0].ndim > 1
    is_plain = settings.weights.ndim == 1 or not by_row
    has_no_rows = granularity == "row" and not by_row
    if has_no_rows or (method == "linear" and is_plain):
        weights = _one_each(method, settings)
        normalize = settings.normalize is not False
        return methods.linear(tensors, weights, normalize=normalize), 0
    assert method in MEANS or method == "linear"
    shape = tensors[0].shape
    if not tensors[0].size:
        return tensors[0].astype(mx.float32), 0
    wide = (-1, shape[-1]) if by_row else (1, -1)
    rows = [one.reshape(wide) for one in tensors]
    start = None if base is None else base.reshape(wide)
    if by_row:
        merged, opposed = _merge_rows(method, start, rows, settings.weights)
    else:
        merged, opposed = _merge_whole(method, start, rows, settings.weights)
    return merged.reshape(shape), opposed


def _merge_changes(
    method: str, base: mx.array, tensors: Sequence[mx.array], settings: TensorSettings
) -> mx.array:
    weights = _one_each(method, settings)
    default = method in ("ties", "dare_ties")
    normalize = default if settings.normalize is None else settings.normalize
    scale = settings.scale
    if method == "tsv":
        return methods.tsv(base, tensors, weights, scale=scale)
    if method == "task_arithmetic":
        return methods.task_arithmetic(
            base, tensors, weights, normalize=normalize, scale=scale
        )
    density = settings.density or (1.0,) * len(tensors)
    if method == "ties":
        return methods.ties(
            base, tensors, weights, density=density, normalize=normalize, scale=scale
        )
    drop = methods.dare if method == "dare" else methods.dare_ties
    return drop(
        base,
        tensors,
        weights,
        density=density,
        seed=settings.seed,
        normalize=normalize,
        scale=scale,
    )


def _one_each(method: str, settings: TensorSettings) -> list[float]:
    weights = settings.weights
    if weights.ndim == 2:
        if np.ptp(weights, axis=0).any():
            raise DoRAError(f"{method} takes one weight a model here, not one a row.")
        weights = weights[0]
    return [float(one) for one in weights]


def mean_shares(weights: np.ndarray, rows: int) -> np.ndarray:
    """The weights of each row, made to sum to 1.

    Raises:
        DoRAError: If one is negative or all are 0.
    """
    shares = np.broadcast_to(weights, (rows, weights.shape[-1]))
    total = shares.sum(1, keepdims=True)
    if (shares < 0).any() or not (total > 0).all():
        raise DoRAError(
            "a mean of directions needs weights of at least 0 with a positive sum, got "
            f"{[float(one) for one in shares[0]]}."
        )
    return shares / total


def _merge_rows(
    method: str, base: mx.array | None, rows: Sequence[mx.array], weights: np.ndarray
) -> tuple[mx.array, int]:
    """Row block by row block; ``magnitude_weighted`` uses the base's lengths alone."""
    count, width = rows[0].shape
    shares = mean_shares(weights, count)
    origin = None if method in ("magnitude_weighted", "linear") else base
    step = max(1, _BLOCK // max(width, 1))
    parts, opposed = [], 0
    for first in range(0, count, step):
        index = slice(first, first + step)
        start = None if base is None else base[index].astype(mx.float32)
        blocks = [one[index].astype(mx.float32) for one in rows]
        base_norm = None
        if start is not None:
            base_norm = np.sqrt(np.array(mx.square(start).sum(axis=1), np.float64))
            if origin is not None:
                blocks = [one - start for one in blocks]
        inner = _inner(blocks)
        length = np.sqrt(np.einsum("jii->ji", inner))
        found = combine(method, inner, length, shares[index], base_norm)
        merged = _combined(blocks, found.coefficients)
        if origin is not None:
            merged = merged + origin[index].astype(mx.float32)
        mx.eval(merged)
        parts.append(merged)
        opposed += int(found.opposed.sum())
    return (parts[0] if len(parts) == 1 else mx.concatenate(parts)), opposed


def _merge_whole(
    method: str, base: mx.array | None, rows: Sequence[mx.array], weights: np.ndarray
) -> tuple[mx.array, int]:
    """The tensor as one row, of shape ``(1, size)``, in column blocks."""
    size = rows[0].shape[1]
    slices = [slice(i, i + _BLOCK) for i in range(0, size, _BLOCK)]

    def blocks(index: slice) -> list[mx.array]:
        found = [one[:, index].astype(mx.float32) for one in rows]
        if base is None:
            return found
        start = base[:, index].astype(mx.float32)
        return [one - start for one in found]

    inner = sum(
        (_inner(blocks(index)) for index in slices),
        start=np.zeros((1, len(rows), len(rows))),
    )
    shares = mean_shares(np.atleast_2d(weights)[:1], 1)
    opposed = 0
    if method == "slerp":
        coefficients = _plain_slerp(inner, shares)
    else:
        length = np.sqrt(np.einsum("jii->ji", inner))
        found = combine(method, inner, length, shares)
        coefficients, opposed = found.coefficients, int(found.opposed.sum())
    parts = []
    for index in slices:
        part = _combined(blocks(index), coefficients)
        if base is not None:
            part = part + base[:, index].astype(mx.float32)
        mx.eval(part)
        parts.append(part)
    return (parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)), opposed


def _plain_slerp(inner: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Coefficients as in mergekit: those of the directions, put on the vectors."""
    if inner.shape[1] != 2:
        raise DoRAError(f"slerp takes two inputs, got {inner.shape[1]}.")
    norms = np.sqrt(inner[0, 0, 0] * inner[0, 1, 1])
    cosine = float(np.clip(inner[0, 0, 1] / norms, -1, 1)) if norms > 0 else 0.0
    if abs(cosine) > _COLLINEAR:
        return shares
    theta = np.arccos(cosine)
    return np.sin(shares * theta) / np.sin(theta)


def _inner(blocks: Sequence[mx.array]) -> np.ndarray:
    """Inner products of the rows of each pair. Shape ``(rows, N, N)``, float64."""
    count = len(blocks)
    pairs = list(combinations_with_replacement(range(count), 2))
    rows, width = blocks[0].shape
    pad = -width % _SPAN if width > _SPAN else 0
    sums = []
    for i, k in pairs:
        product = blocks[i] * blocks[k]
        if pad:
            product = mx.pad(product, [(0, 0), (0, pad)])
        short = product.reshape(rows, -1, min(_SPAN, max(product.shape[1], 1)))
        sums.append(short.sum(axis=2))
        mx.eval(sums[-1])
    inner = np.empty((rows, count, count))
    for (i, k), value in zip(pairs, sums, strict=True):
        inner[:, i, k] = inner[:, k, i] = np.array(value, np.float64).sum(axis=1)
    return inner


def _combined(blocks: Sequence[mx.array], coefficients: np.ndarray) -> mx.array:
    beta = mx.array(coefficients.astype(np.float32))
    total = beta[:, :1] * blocks[0]
    for i, one in enumerate(blocks[1:], 1):
        total = total + beta[:, i : i + 1] * one
    return total
