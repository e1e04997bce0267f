"""Rows of tokens as padded arrays, and the batches of a measurement."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import mlx.core as mx
import numpy as np

from mlx_dora.data.dataset import Example, IncompleteSpans, target_spans
from mlx_dora.errors import DoRAError

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


@dataclass
class RowCounts:
    """What happened to the rows on their way into batches, each row counted once.

    Args:
        rows: All rows.
        truncated: Rows longer than the maximum.
        skipped: Rows left out because they have no target.
        unanswered: Those of them that hold no answer, of whatever length.
        unlocated: Rows in which the chat template does not show every answer.
        longest: Tokens of the longest row.
    """

    rows: int = 0
    truncated: int = 0
    skipped: int = 0
    longest: int = 0
    unanswered: int = 0
    unlocated: int = 0

    def add(self, example: Example, max_seq_length: int) -> bool:
        """Count one row; False if no target is left in it."""
        tokens, targets = example
        self.rows += 1
        self.longest = max(self.longest, len(tokens))
        self.truncated += len(tokens) > max_seq_length
        usable = bool(target_spans(targets, min(len(tokens), max_seq_length)))
        self.skipped += not usable
        is_incomplete = isinstance(targets, IncompleteSpans)
        self.unlocated += is_incomplete
        self.unanswered += targets == () and not is_incomplete
        return usable

    def describe(self, max_seq_length: int) -> str | None:
        """One line on what was cut or left out; None if nothing was."""
        parts = []
        if self.truncated:
            parts.append(
                f"{self.truncated} of {self.rows} rows are longer than "
                f"max_seq_length {max_seq_length} and were cut (longest: "
                f"{self.longest} tokens)"
            )
        if self.unanswered:
            parts.append(
                f"{self.unanswered} of {self.rows} rows have no answer to learn and "
                "were left out (mask_prompt takes the assistant's turn that ends a "
                "row, all_turns every turn of the assistant's)"
            )
        if self.unlocated:
            parts.append(
                f"in {self.unlocated} of {self.rows} rows the chat template does not "
                "show every answer; what it does not show does not count"
            )
        if beyond := self.skipped - self.unanswered:
            parts.append(
                f"{beyond} of {self.rows} rows have no target token within "
                f"{max_seq_length} tokens and were left out"
            )
        return "; ".join(parts) or None


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


def refuse_empty(counts: RowCounts, max_seq_length: int) -> NoReturn:
    """Say that there is nothing to train on or to measure."""
    if counts.unanswered == counts.rows:
        raise DoRAError(
            "no row has an answer to learn: mask_prompt needs rows that end with a "
            "turn of role 'assistant', all_turns needs such a turn anywhere."
        )
    raise DoRAError(
        f"no row has a target token within max_seq_length {max_seq_length}: raise it, "
        "or train on the prompt too (no mask_prompt)."
    )
