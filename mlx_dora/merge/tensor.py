r"""One tensor of several models, merged: row by row, or as a whole.

``granularity="row"`` is ours: length and direction of each output row apart.
``"tensor"`` is mergekit's: the tensor as one vector, where its slerp interpolates the
vectors as they are, not their directions. The result is float32. It is made block by
block from tensors in memory or in their files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.matrix.grams import gram_norm
from mlx_dora.merge import blockwise, methods
from mlx_dora.merge.blockwise import Tensor
from mlx_dora.merge.directions import combine
from mlx_dora.merge.names import ELEMENTWISE, MEANS

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


@dataclass
class Merged:
    """A tensor that is merged while its blocks are taken.

    Attributes:
        blocks: Its elements, float32, in consecutive flat blocks; not evaluated.
        unseen: Inputs whose NaN and inf do not show in the blocks: those that may be
            masked out, or give only weights. Every other input goes into each element
            by a product and a sum, which let neither through unseen.
        opposed: Rows whose directions cancel (they keep the heaviest model's), of the
            blocks taken so far.
        unknown: Elements nobody has Fisher information of.
    """

    blocks: Iterator[mx.array]
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

    Arguments and errors as those of `merge_blocks`.

    Returns:
        The merged tensor, float32 and evaluated, and the number of rows whose
        directions cancel (they keep the heaviest model's).
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
    """Merge one tensor of N models, holding a few blocks of it.

    With a base, ``slerp``, ``karcher`` and ``nmean`` merge the task vectors. A tensor
    with fewer than two axes (norm weights, biases) has no rows: methods of rows take
    the weighted mean there. ``ties`` holds the sizes of one task vector, and ``tsv``
    everything.

    Args:
        method: A method's name.
        base: The base's tensor, or None.
        tensors: N of one shape.
        settings: Of the method, for this tensor.
        granularity: ``"row"`` or ``"tensor"``.

    Raises:
        DoRAError: If the method needs a base, or weights cannot be used.
    """
    beside = [] if base is None else [base]
    if method in ELEMENTWISE or method == "task_arithmetic":
        if base is None:
            raise DoRAError(f"{method} merges changes of a base: give the base.")
        hidden = [base, *tensors] if method in ELEMENTWISE else []
        return Merged(_merge_changes(method, base, tensors, settings), hidden)
    by_row = granularity == "row" and tensors[0].ndim > 1
    is_plain = settings.weights.ndim == 1 or not by_row
    has_no_rows = granularity == "row" and not by_row
    if has_no_rows or (method == "linear" and is_plain):
        weights = _one_each(method, settings)
        block = blockwise.linear_block(weights, settings.normalize is not False)
        return Merged(blockwise.parts(block, tensors), beside)
    assert method in MEANS or method == "linear"
    if not tensors[0].size:
        return Merged(iter([mx.zeros((0,))]))
    if not by_row:
        return _merge_whole(method, base, tensors, settings.weights)
    return _merge_rows(method, base, tensors, settings.weights)


def _merge_changes(
    method: str, base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Iterator[mx.array]:
    weights = _one_each(method, settings)
    default = method in ("ties", "dare_ties")
    normalize = default if settings.normalize is None else settings.normalize
    scale = settings.scale
    if method == "task_arithmetic":
        block = blockwise.sum_block(weights, normalize, scale)
        return blockwise.parts(block, [base, *tensors])
    density = settings.density or (1.0,) * len(tensors)
    shares = blockwise.shares_of(density, len(tensors))

    def blocks() -> Iterator[mx.array]:
        if method == "tsv":
            start, *others = (blockwise.held(one) for one in (base, *tensors))
            yield methods.tsv(start, others, weights, scale=scale)
            return
        if method == "ties":
            pairs = zip(tensors, shares, strict=True)
            thin = blockwise.trimmed([blockwise.cut_of(base, *one) for one in pairs])
        else:
            thin = blockwise.dropped(shares, settings.seed)
        make = blockwise.sum_block if method == "dare" else blockwise.agreed_block
        block = make(weights, normalize, scale, thin)
        yield from blockwise.parts(block, [base, *tensors])

    return blocks()


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
    method: str, base: Tensor | None, tensors: Sequence[Tensor], weights: np.ndarray
) -> Merged:
    """Row block by row block; ``magnitude_weighted`` uses the base's lengths alone."""
    width = tensors[0].shape[-1]
    rows = [one.reshape((-1, width)) for one in tensors]
    whole_base = None if base is None else base.reshape((-1, width))
    count = rows[0].shape[0]
    shares = mean_shares(weights, count)
    is_relative = base is not None and method not in ("magnitude_weighted", "linear")
    step = max(1, blockwise.BLOCK // max(width, 1))

    def blocks() -> Iterator[mx.array]:
        for first in range(0, count, step):
            index = slice(first, first + step)
            values = [one[index].astype(mx.float32) for one in rows]
            start = base_norm = None
            if whole_base is not None:
                start = whole_base[index].astype(mx.float32)
                if is_relative:
                    values = [one - start for one in values]
                else:
                    base_norm = np.sqrt(_inner([start])[:, 0, 0])
            inner = _inner(values)
            if not np.isfinite(inner).all():
                yield mx.full(values[0].shape, mx.nan)
                continue
            length = gram_norm(inner)
            found = combine(method, inner, length, shares[index], base_norm)
            merged.opposed += int(found.opposed.sum())
            one = _combined(values, found.coefficients)
            yield one + start if is_relative and start is not None else one

    unseen = [] if base is None or is_relative else [base]
    merged = Merged(blocks(), unseen)
    return merged


def _merge_whole(
    method: str, base: Tensor | None, tensors: Sequence[Tensor], weights: np.ndarray
) -> Merged:
    """The tensor as one row; each input is read twice, for the angles and the sum."""
    flat = [one.reshape(-1) for one in (tensors if base is None else [base, *tensors])]
    size = flat[0].size
    slices = [slice(i, i + blockwise.BLOCK) for i in range(0, size, blockwise.BLOCK)]

    def values(index: slice) -> tuple[mx.array | None, list[mx.array]]:
        if base is not None:
            return blockwise.changes(index, flat)
        return None, [one[index].astype(mx.float32) for one in flat]

    inner = sum(
        (_inner([one[None] for one in values(index)[1]]) for index in slices),
        start=np.zeros((1, len(tensors), len(tensors))),
    )
    shares = mean_shares(np.atleast_2d(weights)[:1], 1)
    opposed = 0
    if not np.isfinite(inner).all():
        coefficients = np.full_like(shares, np.nan)
    elif method == "slerp":
        coefficients = _plain_slerp(inner, shares)
    else:
        length = gram_norm(inner)
        found = combine(method, inner, length, shares)
        coefficients, opposed = found.coefficients, int(found.opposed.sum())
    betas = [float(one) for one in coefficients[0]]

    def blocks() -> Iterator[mx.array]:
        for index in slices:
            start, others = values(index)
            one = blockwise.weighted_sum(others, betas)
            yield one if start is None else one + start

    return Merged(blocks(), opposed=opposed)


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
    mx.eval(blocks)
    views = [np.array(one, copy=False) for one in blocks]
    inner = np.empty((len(views[0]), count, count))
    with np.errstate(over="ignore", invalid="ignore"):  # whoever uses them looks
        for i, k in combinations_with_replacement(range(count), 2):
            inner[:, i, k] = inner[:, k, i] = _products(views[i], views[k])
    return inner


def _products(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    rows, width = one.shape
    if rows == 1 and width > _SPAN:
        spans, left = divmod(width, _SPAN)
        head = [x[0, : width - left].reshape(spans, _SPAN) for x in (one, other)]
        tail = [x[:, width - left :] for x in (one, other)]
        return _products(*head).sum(keepdims=True) + _products(*tail)
    total = np.zeros(rows)
    for first in range(0, width, _SPAN):
        index = slice(first, first + _SPAN)
        total += np.einsum("jw,jw->j", one[:, index], other[:, index])
    return total


def _combined(blocks: Sequence[mx.array], coefficients: np.ndarray) -> mx.array:
    beta = mx.array(coefficients.astype(np.float32))
    columns = [beta[:, i : i + 1] for i in range(len(blocks))]
    return blockwise.sum_of([b * v for b, v in zip(columns, blocks, strict=True)])
