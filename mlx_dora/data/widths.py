"""Groups rows of similar length, so that whole batches have one width."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_SHAPES = 16
"""Maximum number of batch shapes in an epoch; a compiled step is traced once each."""

_MOST_LENGTHS = 512  # lengths between which groups may end
_BATCH_COST = 32  # a batch costs as much as this part of its tokens would


@dataclass(frozen=True, kw_only=True)
class Group:
    """The rows that are padded to one width, and how they fall into batches.

    Args:
        width: Tokens of each row, padding included.
        rows: Number of rows of the data in the group.
        sizes: Rows of each batch. Their sum exceeds `rows` by the empty rows.
    """

    width: int
    rows: int
    sizes: tuple[int, ...]


def group_by_width(
    lengths: Sequence[int], batch_tokens: int, ranks: int = 1
) -> list[Group]:
    """Divide rows into groups with the least padding, in order of their width.

    The groups are an optimal partition of the sorted lengths, found by dynamic
    programming: they minimize the tokens of all batches, padding and empty rows
    included, plus a small cost per batch that keeps few rows from becoming many
    batches. Together the groups have at most `MOST_SHAPES` shapes of batches. Either
    all batches of a group have one size, the last filled up with empty rows, or there
    are two sizes and no empty row.

    Args:
        lengths: Tokens of each row, at least 2 and at most ``batch_tokens // ranks``.
        batch_tokens: Maximum number of tokens in a batch, padding included.
        ranks: Number of processes that share each batch; each gets as many rows.
    """
    lines = np.sort(np.asarray(lengths))
    step = 1
    while len(ends := np.unique(_rounded(lines, step))) > _MOST_LENGTHS:
        step *= 2
    # Rows of up to each end. Units are rows that the processes share equally.
    before = np.concatenate([[0], np.searchsorted(lines, ends, side="right")])
    units = -(-(before[None, 1:] - before[:-1, None]) // ranks)  # (start, end)
    units = np.maximum(units, 1)  # below the diagonal, where no group lies
    batches = -(-units // (batch_tokens // ends // ranks)[None])
    even = batches * -(-units // batches)  # all batches of one size
    price = (ends - 1)[None] * ranks
    extra = batches * batch_tokens / _BATCH_COST
    costs = {1: price * even + extra, 2: price * units + extra}
    for cost in costs.values():
        cost[np.tril_indices(len(ends), -1)] = np.inf
    return [
        _group(
            int(ends[stop - 1]),
            int(before[stop] - before[start]),
            int(batches[start, stop - 1]),
            ranks,
            is_even=shapes == 1,
        )
        for start, stop, shapes in _partition(costs, len(ends))
    ]


def _rounded(lengths: np.ndarray, step: int) -> np.ndarray:
    """Lengths rounded up to a multiple, but not above the longest."""
    return np.minimum(-(-lengths // step) * step, lengths[-1])


def _partition(costs: dict[int, np.ndarray], count: int) -> list[tuple[int, int, int]]:
    """The cheapest division of ``0..count`` into parts: start, stop, shapes.

    Args:
        costs: By the number of shapes that it takes, the cost of the part from each
            start to each last place. Shape ``(count, count)``.
        count: Number of places.
    """
    best = np.full((MOST_SHAPES + 1, count + 1), np.inf)
    best[:, 0] = 0
    chosen = np.zeros((MOST_SHAPES + 1, count + 1, 2), int)
    for shapes in range(1, MOST_SHAPES + 1):
        for own, cost in costs.items():
            if own > shapes:
                continue
            total = best[shapes - own, :-1, None] + cost
            starts = total.argmin(axis=0)
            least = total[starts, np.arange(count)]
            better = least < best[shapes, 1:]
            best[shapes, 1:][better] = least[better]
            chosen[shapes, 1:][better] = np.stack(
                [starts[better], np.full(better.sum(), own)], axis=-1
            )
    parts, stop, left = [], count, MOST_SHAPES
    while stop:
        start, own = (int(value) for value in chosen[left, stop])
        parts.append((start, stop, own))
        stop, left = start, left - own
    return parts[::-1]


def _group(width: int, rows: int, batches: int, ranks: int, *, is_even: bool) -> Group:
    units = -(-rows // ranks)
    if is_even:
        sizes = [-(-units // batches)] * batches
    else:
        sizes = [units // batches + (i < units % batches) for i in range(batches)]
    return Group(width=width, rows=rows, sizes=tuple(ranks * size for size in sizes))
