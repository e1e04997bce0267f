"""Rows of tokens as padded arrays, and the batches of a measurement."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_dora.data.counts import RowCounts, refuse_empty
from mlx_dora.data.targets import Example, target_spans

Batch = tuple[mx.array, mx.array]
"""Tokens ``(rows, length)``, and marks that tell the loss what they are.

Mostly ``(rows, 2)``, as mlx-lm has it: per row the first target's position and the
length. With several spans of targets ``(rows, length, 1)``: 1 where a token is one.
For packed rows ``(rows, length, 2)``: the same, and the number of the token's document,
from 1; 0 is padding.
"""


class Examples(Protocol):
    """What a batch is made of: a `TokenDataset`, or a list of examples."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


def padded_width(length: int, max_seq_length: int) -> int:
    """The width of an array for rows of up to `length` tokens.

    The inputs (all tokens but the last) are padded to a multiple of 8, past 256 of a
    16th to a 32nd of their length: little is wasted, and few widths occur, each of
    which a compiled step is traced for.
    """
    inputs = max(length - 1, 1)
    step = max(8, 2 ** ((inputs - 1).bit_length() - 5))
    return min(1 + step * -(-inputs // step), max_seq_length)


def pad_batch(examples: Sequence[Example], max_seq_length: int) -> Batch:
    """Cut and pad rows of one example each.

    Returns:
        Tokens, int32 ``(rows, length)``, zeros after each row's end; and ``(rows, 2)``
        with the position of each row's first target and its length after truncation,
        or one mark a token (see `Batch`) if an example's targets are spans.
    """
    firsts = [first for _, first in examples if isinstance(first, int)]
    if len(firsts) < len(examples):
        tokens, marks = pack_batch([[one] for one in examples], max_seq_length)
        return tokens, marks[:, :, :1]
    lengths = [min(len(tokens), max_seq_length) for tokens, _ in examples]
    width = padded_width(max(lengths), max_seq_length)
    tokens = np.zeros((len(examples), width), np.int32)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        tokens[row, :length] = example[0][:length]
    return mx.array(tokens), mx.array(list(zip(firsts, lengths, strict=True)))


def pack_batch(rows: Sequence[Sequence[Example]], max_seq_length: int) -> Batch:
    """Put each row's examples one after the other and pad the rows.

    Returns:
        Tokens, int32 ``(rows, length)``; and int32 ``(rows, length, 2)`` with 1
        where a token is a target, and the number of its document.
    """
    cut = [
        [(tokens[:max_seq_length], targets) for tokens, targets in row] for row in rows
    ]
    longest = max(sum(len(tokens) for tokens, _ in row) for row in cut)
    width = padded_width(longest, max_seq_length)
    assert longest <= width, "the examples of a row are longer than max_seq_length"
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


def batches_once(
    dataset: Examples,
    batch_size: int,
    max_seq_length: int,
    num_batches: int = -1,
    counts: RowCounts | None = None,
) -> Iterator[Batch]:
    """Every row once, or rows evenly spread over the data set for `num_batches`.

    The choice is the same each time, so that two measurements compare.

    Args:
        dataset: The examples.
        batch_size: Rows in a batch; the last one may have fewer.
        max_seq_length: Rows are cut to this many tokens.
        num_batches: How many batches at most; -1 for all.
        counts: Filled with what happened to the rows.

    Raises:
        DoRAError: If no row has a target token.
    """
    counts = RowCounts() if counts is None else counts
    total = len(dataset)
    wanted = total if num_batches == -1 else min(total, num_batches * batch_size)
    chosen = []
    for place in range(wanted):
        example = dataset[place * total // wanted]
        if counts.add(example, max_seq_length):
            chosen.append(example)
    if not chosen:
        refuse_empty(counts, max_seq_length)
    chosen.sort(key=lambda one: min(len(one[0]), max_seq_length))
    for start in range(0, len(chosen), batch_size):
        yield pad_batch(chosen[start : start + batch_size], max_seq_length)
