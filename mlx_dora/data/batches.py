"""Rows of tokens as padded arrays, and the batches of a measurement."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_dora.data.counts import RowCounts, refuse_empty
from mlx_dora.data.targets import Example, target_spans

Batch = tuple[mx.array, ...]
"""Tokens ``(rows, length)``, and marks that say which tokens are targets.

A batch of units (see `unit_batch`) has a third array: the index of each row's example.

The marks have one of three shapes. ``(rows, 2)``, the usual shape and mlx-lm's: the
position of each row's first target, and the row's length. ``(rows, length, 1)``, for
several spans of targets: 1 at each target. ``(rows, length, 2)``, for packed rows: 1 at
each target, and the number of the token's document, counted from 1 (0 is padding).
"""


class Examples(Protocol):
    """Source of the examples in a batch: a `TokenDataset` or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


def shape_of(inputs: Any) -> tuple[int, ...]:
    """The shape of a batch's tokens; of a tree of arrays, all shapes in a row."""
    if isinstance(inputs, mx.array):
        return tuple(inputs.shape)
    leaves = cast(list[tuple[str, Any]], tree_flatten(inputs))
    return tuple(chain.from_iterable(leaf.shape for _, leaf in leaves))


def padded_width(length: int, max_seq_length: int) -> int:
    """The width of an array for rows of up to `length` tokens.

    The inputs (all tokens but the last) are padded to a multiple of 8. Beyond 256
    tokens the multiple is 1/32 to 1/16 of the length. This wastes little, and keeps
    the number of widths small, since a compiled step is traced once per width.
    """
    inputs = max(length - 1, 1)
    step = max(8, 2 ** ((inputs - 1).bit_length() - 5))
    return min(1 + step * -(-inputs // step), max_seq_length)


def pad_batch(
    examples: Sequence[Example], max_seq_length: int, width: int | None = None
) -> Batch:
    """Truncate and pad examples, one per row.

    Args:
        examples: The examples.
        max_seq_length: Maximum number of tokens in a row.
        width: Tokens of each row; default: `padded_width` of the longest.

    Returns:
        Tokens, int32 ``(rows, length)``, with zeros after each row's end; and marks
        ``(rows, 2)``: the position of each row's first target and its length after
        truncation. If the targets of an example are spans, one mark per token instead
        (see `Batch`).
    """
    firsts = [first for _, first in examples if isinstance(first, int)]
    if len(firsts) < len(examples):
        rows = [[example] for example in examples]
        tokens, marks = pack_batch(rows, max_seq_length, width)
        return tokens, marks[:, :, :1]
    lengths = [min(len(tokens), max_seq_length) for tokens, _ in examples]
    width = width or padded_width(max(lengths), max_seq_length)
    tokens = np.zeros((len(examples), width), np.int32)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        tokens[row, :length] = example[0][:length]
    return mx.array(tokens), mx.array(list(zip(firsts, lengths, strict=True)))


def pack_batch(
    rows: Sequence[Sequence[Example]], max_seq_length: int, width: int | None = None
) -> Batch:
    """Concatenate the examples of each row and pad the rows.

    The arguments are those of `pad_batch`, with the examples of each row.

    Returns:
        Tokens, int32 ``(rows, length)``; and int32 ``(rows, length, 2)`` with 1
        where a token is a target, and the number of its document.
    """
    cut = [
        [(tokens[:max_seq_length], targets) for tokens, targets in row] for row in rows
    ]
    longest = max(sum(len(tokens) for tokens, _ in row) for row in cut)
    width = width or padded_width(longest, max_seq_length)
    assert longest <= width, "a packed row is longer than max_seq_length"
    batch = np.zeros((len(rows), width), np.int32)
    marks = np.zeros((len(rows), width, 2), np.int32)
    for place, row in enumerate(cut):
        at = 0
        for number, (tokens, targets) in enumerate(row, start=1):
            here = slice(at, at + len(tokens))
            batch[place, here] = tokens
            marks[place, here, 1] = number
            for start, end in target_spans(targets, len(tokens)):
                marks[place, at + start : at + end, 0] = 1
            at = here.stop
    return mx.array(batch), mx.array(marks)


EMPTY: Example = ([0, 0], 2)  # a row without targets


def unit_batch(
    dataset: Examples,
    starts: Sequence[int],
    unit: int,
    max_seq_length: int,
    width: int | None = None,
) -> Batch:
    """Pad units of consecutive examples that must stay in one batch, such as pairs.

    Args:
        dataset: The examples.
        starts: Index of each unit's first example; -1 for a unit without targets, which
            fills up a batch.
        unit: Number of examples in a unit.
        max_seq_length: Maximum number of tokens in a row.
        width: Tokens of each row; default: `padded_width` of the longest.

    Returns:
        Tokens ``(unit * n, length)`` and marks, as from `pad_batch`: the first example
        of all n units, then the second of all. And the indices of the examples, int32
        ``(unit * n,)``, with -1 for rows that fill up.
    """
    indices = [start + k if start >= 0 else -1 for k in range(unit) for start in starts]
    examples = [dataset[index] if index >= 0 else EMPTY for index in indices]
    return *pad_batch(examples, max_seq_length, width), mx.array(indices)


def batches_once(
    dataset: Examples,
    batch_size: int,
    max_seq_length: int,
    num_batches: int = -1,
    counts: RowCounts | None = None,
    batch_tokens: int | None = None,
    unit: int | None = None,
) -> Iterator[Batch]:
    """Yield each row once, or rows spread evenly over the data for `num_batches`.

    The choice of rows is deterministic, so that measurements can be compared.

    Args:
        dataset: The examples.
        batch_size: Rows per batch; the last batch may be smaller.
        max_seq_length: Rows are cut to this many tokens.
        num_batches: Maximum number of batches of `batch_size` rows; -1 for all.
        counts: Updated with the number of truncated and skipped rows.
        batch_tokens: Group the same rows by tokens instead: as many rows of similar
            length as fit into this many tokens, padding included, but at least one.
        unit: Yield batches of units of this many consecutive examples, which count as
            one row above (see `unit_batch`); None for batches of single rows.

    Raises:
        DoRAError: If no row has a target token.
    """
    counts = RowCounts() if counts is None else counts
    size = unit or 1
    total = len(dataset) // size
    wanted = total if num_batches == -1 else min(total, num_batches * batch_size)
    chosen, lengths = [], {}
    for place in range(wanted):
        start = size * (place * total // wanted)
        if length := counts.add_unit(dataset, start, size, max_seq_length):
            chosen.append(start)
            lengths[start] = length
    if not chosen:
        refuse_empty(counts, max_seq_length)
    chosen.sort(key=lengths.__getitem__)
    at = 0
    while at < len(chosen):
        count = batch_size
        if batch_tokens is not None:
            rest = [lengths[start] for start in chosen[at:]]
            count = _rows_that_fit(rest, batch_tokens // size, max_seq_length)
        here = chosen[at : at + count]
        if unit is None:
            yield pad_batch([dataset[start] for start in here], max_seq_length)
        else:
            yield unit_batch(dataset, here, unit, max_seq_length)
        at += count


def _rows_that_fit(
    lengths: Sequence[int], batch_tokens: int, max_seq_length: int
) -> int:
    """Number of the first rows, of increasing length, that fit into a batch."""
    for count, length in enumerate(lengths):
        if (count + 1) * padded_width(length, max_seq_length) > batch_tokens:
            return max(count, 1)
    return len(lengths)
