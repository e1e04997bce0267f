r"""Merges one tensor of several models, row by row or as a whole.

With ``granularity="row"``, our definition, the length and the direction of each output
row are merged separately. With ``"tensor"``, mergekit's definition, the tensor is one
vector, and slerp interpolates the vectors without normalizing them. The float32 result
is computed block by block from tensors in memory or in files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement
from typing import Literal

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.matrix.grams import gram_norm
from mlx_dora.merge.fisher.information import informed_weights
from mlx_dora.merge.methods import METHODS, MergeMethod, blockwise, elementwise
from mlx_dora.merge.methods.blockwise import Tensor, slices
from mlx_dora.merge.methods.rows import RowFunction, Rows
from mlx_dora.merge.methods.settings import TensorSettings
from mlx_dora.merge.weights import normalized

# Number of products to sum in float32; these sums are added in float64. Summing a
# million in float32 gave a slerp of whole tensors an error of 7e-5.
_SPAN = 1024


@dataclass
class Merged:
    """A merged tensor, computed while its blocks are read.

    Attributes:
        blocks: The elements, float32, in consecutive flat blocks; not evaluated.
        unseen: Inputs whose NaN and inf may not show in the blocks, because they can be
            masked out or only determine weights. Every other input enters each element
            through products and sums, which propagate NaN and inf.
        opposed: Number of rows whose directions cancel, in the blocks read so far; they
            keep the direction of the model with the largest weight.
        unknown: Number of elements without Fisher information.
    """

    blocks: Iterator[mx.array] = field(default_factory=lambda: iter(()))
    unseen: list[Tensor] = field(default_factory=list)
    opposed: int = 0
    unknown: int = 0


def merge_tensor(
    method: str,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    settings: TensorSettings,
    granularity: str = "row",
) -> tuple[mx.array, int]:
    """Merge one tensor of N models in memory.

    Arguments and errors are those of `merge_blocks`.

    Returns:
        The merged tensor, float32 and evaluated, and the number of rows whose
        directions cancel.
    """
    merged = merge_blocks(method, base, tensors, settings, granularity)
    return blockwise.joined(merged.blocks, tensors[0].shape), merged.opposed


def merge_blocks(
    method: str,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    settings: TensorSettings,
    granularity: str = "row",
) -> Merged:
    """Merge one tensor of N models, holding a few blocks of it in memory.

    With a base, methods that support it merge changes from the base. A tensor with
    fewer than two axes (norm weights, biases) has no rows; most row methods use the
    weighted mean there. ``ties`` holds the magnitudes of one task vector in memory, and
    ``tsv`` holds everything. The granularity is ``"row"`` or ``"tensor"``.

    Raises:
        DoRAError: If the method needs a base, or weights cannot be used.
    """
    entry = METHODS[method]
    if entry.needs_base and base is None:
        raise DoRAError(f"{method} merges changes from a base: give the base.")
    way = way_of(entry, tensors[0].ndim, settings, granularity)
    if way == "blocks":
        settings.plain_weights()
        blocks = entry.block_function(base, tensors, settings)
        hidden = [tensor for tensor in (base, *tensors) if tensor is not None]
        if entry.is_exact:  # every input enters each element
            hidden = [] if base is None or entry.base == "changes" else [base]
        return Merged(blocks, hidden)
    if way == "mean":
        blocks = elementwise.linear(None, tensors, settings)
        return Merged(blocks, [] if base is None else [base])
    if not tensors[0].size:
        return Merged(iter([mx.zeros((0,))]))
    is_relative = base is not None and entry.base in ("optional", "changes")
    if way == "whole":
        start = base if is_relative else None
        return _merge_whole(entry, start, tensors, settings)
    return _merge_rows(entry, base, tensors, settings, is_relative)


Way = Literal["blocks", "mean", "whole", "rows"]
"""How a tensor is merged: by its elements, by the weighted mean, as one vector, or row
by row."""


def way_of(
    entry: MergeMethod, ndim: int, settings: TensorSettings, granularity: str
) -> Way:
    """How a method merges a tensor with `ndim` axes."""
    by_row = granularity == "row" and ndim > 1
    is_plain = settings.weights.ndim == 1 or not by_row
    if entry.blocks and (is_plain or entry.base == "changes"):
        return "blocks"
    if granularity == "row" and not by_row and entry.vectors == "mean":
        return "mean"
    return "rows" if by_row else "whole"


def merge_informed_tensor(
    tensors: Sequence[mx.array],
    settings: TensorSettings,
    informations: Sequence[mx.array | None],
) -> tuple[mx.array, int]:
    """Merge one tensor of N models by their Fisher information.

    The information of the models is all ``(out,)`` or all of the tensor's shape. If any
    is None, the result is the weighted mean.

    Returns:
        The merged tensor, float32, and the number of elements without information.

    Raises:
        DoRAError: If weights are negative or all 0, or by row and the information by
            element.
    """
    known = [information for information in informations if information is not None]
    size = tensors[0].size
    if len(known) < len(informations):
        return merge_tensor("linear", None, tensors, settings)[0], size
    rows = tensors[0].shape[0]
    shares = normalized(np.broadcast_to(settings.weights, (rows, len(known))))
    if known[0].ndim == 1:
        informed, unknown = informed_weights(shares, known)
        by_row = replace(settings, weights=informed)
        merged, _ = merge_tensor("linear", None, tensors, by_row)
        return merged, unknown * (size // rows)
    if np.ptp(shares, axis=0).any():
        raise DoRAError(
            "Fisher information by element needs one weight per model, not one per row."
        )
    return elementwise.fisher(tensors, known, shares[0].tolist())


def _shares(
    entry: MergeMethod, settings: TensorSettings, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and factors on the merged rows, shapes ``(rows, N)`` and ``(rows, 1)``.

    A mean's weights sum to 1; if they are not to be normalized, their sum is a factor.
    """
    weights = settings.weights
    shares = np.broadcast_to(weights, (rows, weights.shape[-1]))
    factors = np.ones((rows, 1))
    if not entry.is_mean:
        return shares, factors
    if not settings.normalizes(True):
        factors = shares.sum(1, keepdims=True)
    return normalized(shares), factors


def _merge_rows(
    entry: MergeMethod,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    settings: TensorSettings,
    is_relative: bool,
) -> Merged:
    """Merge blocks of rows; without `is_relative`, use only the base's row lengths."""
    width = tensors[0].shape[-1]
    rows = [tensor.reshape((-1, width)) for tensor in tensors]
    whole_base = None if base is None else base.reshape((-1, width))
    count = rows[0].shape[0]
    shares, factors = _shares(entry, settings, count)
    function = entry.row_function
    places = slices(count, max(1, blockwise.BLOCK // max(width, 1)))
    merged = Merged(unseen=[] if base is None or is_relative else [base])

    def blocks() -> Iterator[mx.array]:
        for index in places:
            values = blockwise.values(index, rows)
            start = base_norm = None
            if whole_base is not None:
                start = whole_base[index].astype(mx.float32)
                if is_relative:
                    values = [value - start for value in values]
                else:
                    base_norm = np.sqrt(inner_products([start])[:, 0, 0])
            inner = inner_products(values)
            if not np.isfinite(inner).all():
                yield mx.full(values[0].shape, mx.nan)
                continue
            beta, opposed = _coefficients(function, inner, shares[index], base_norm)
            merged.opposed += opposed
            columns = mx.array((beta * factors[index]).astype(np.float32))
            columns = [columns[:, i : i + 1] for i in range(len(values))]
            block = blockwise.weighted_sum(values, columns)
            yield block + start if is_relative and start is not None else block

    merged.blocks = blocks()
    return merged


def _merge_whole(
    entry: MergeMethod,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    settings: TensorSettings,
) -> Merged:
    """Merge a tensor as one row; reads each input twice, for angles and for the sum."""
    every = tensors if base is None else [base, *tensors]
    flat = [tensor.reshape(-1) for tensor in every]
    places = slices(flat[0].size)

    def values(index: slice) -> tuple[mx.array | None, list[mx.array]]:
        if base is not None:
            return blockwise.changes(index, flat)
        return None, blockwise.values(index, flat)

    inner = np.zeros((1, len(tensors), len(tensors)))
    for index in places:
        inner = inner + inner_products([block[None] for block in values(index)[1]])
    only = replace(settings, weights=np.atleast_2d(settings.weights)[:1])
    shares, factors = _shares(entry, only, 1)
    coefficients, opposed = np.full_like(shares, np.nan), 0
    if np.isfinite(inner).all():
        coefficients, opposed = _coefficients(entry.whole_function, inner, shares)
    betas = (coefficients * factors)[0].tolist()

    def blocks() -> Iterator[mx.array]:
        for index in places:
            start, others = values(index)
            block = blockwise.weighted_sum(others, betas)
            yield block if start is None else block + start

    return Merged(blocks(), opposed=opposed)


def _coefficients(
    function: RowFunction,
    inner: np.ndarray,
    shares: np.ndarray,
    base_norm: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Coefficients of the input rows, and the number of rows that cancel."""
    length = gram_norm(inner)
    rows = Rows(inner=inner, magnitude=length, weights=shares, base_norm=base_norm)
    combination = function(rows)
    return combination.coefficients, int(combination.opposed.sum())


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
