"""Padded batches of examples of similar length."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.data import Example

logger = logging.getLogger(__name__)

PAD_TO = 32
# Batches whose rows are drawn, tokenised and sorted by length together.
POOL = 100

Batch = tuple[mx.array, mx.array]
"""Tokens (rows, length), and per row the first target's position and the length."""


class Examples(Protocol):
    """What a batch is made of: a `TokenDataset`, or a list of examples."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


@dataclass
class RowCounts:
    """What happened to the rows on their way into batches, each row counted once."""

    rows: int = 0
    truncated: int = 0
    skipped: int = 0
    longest: int = 0

    def add(self, example: Example, max_seq_length: int) -> bool:
        """Count one row; False if no target is left in it."""
        tokens, first = example
        self.rows += 1
        self.longest = max(self.longest, len(tokens))
        self.truncated += len(tokens) > max_seq_length
        usable = min(len(tokens), max_seq_length) > max(first, 1)
        self.skipped += not usable
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
        if self.skipped:
            parts.append(
                f"{self.skipped} of {self.rows} rows have no target token within "
                f"{max_seq_length} tokens and were left out"
            )
        return "; ".join(parts) or None


def pad_batch(examples: Sequence[Example], max_seq_length: int) -> Batch:
    """Pad rows so that the inputs' length is a multiple of 32, within the maximum.

    Returns:
        Tokens, int32 ``(rows, length)``, zeros after each row's end; and ``(rows, 2)``
        with the position of each row's first target and its length after truncation.
    """
    lengths = [min(len(tokens), max_seq_length) for tokens, _ in examples]
    width = 1 + PAD_TO * -(-(max(lengths) - 1) // PAD_TO)
    width = min(width, max_seq_length)
    tokens = np.zeros((len(examples), width), np.int32)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        tokens[row, :length] = example[0][:length]
    firsts = [first for _, first in examples]
    return mx.array(tokens), mx.array(list(zip(firsts, lengths, strict=True)))


def _sorted_batches(
    examples: list[Example], batch_size: int, max_seq_length: int
) -> list[list[Example]]:
    examples = sorted(examples, key=lambda one: min(len(one[0]), max_seq_length))
    return [
        examples[start : start + batch_size]
        for start in range(0, len(examples), batch_size)
    ]


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
        _refuse_empty(max_seq_length)
    for batch in _sorted_batches(chosen, batch_size, max_seq_length):
        yield pad_batch(batch, max_seq_length)


def iterate_batches(
    dataset: Examples,
    batch_size: int,
    max_seq_length: int,
    *,
    seed: int = 0,
    counts: RowCounts | None = None,
) -> Iterator[Batch]:
    """Batches without end: epochs in a new order each, rows of like length together.

    An epoch is a permutation made from `seed` and the epoch's number alone. Its rows
    are drawn in pools of 100 batches, sorted by length within a pool, and the pool's
    batches shuffled; a pool's last batch may be smaller. Rows without any target are
    left out. What was cut or left out is logged once.

    Raises:
        DoRAError: If no row has a target token.
    """
    counts = RowCounts() if counts is None else counts
    epoch, told = 0, False
    while True:
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(len(dataset))
        found = 0
        for start in range(0, len(order), POOL * batch_size):
            usable = []
            for index in order[start : start + POOL * batch_size]:
                example = dataset[int(index)]
                tally = counts if epoch == 0 else RowCounts()
                if tally.add(example, max_seq_length):
                    usable.append(example)
            found += len(usable)
            if usable and not told and (line := counts.describe(max_seq_length)):
                told = True
                logger.warning("%s", line)
            pool = _sorted_batches(usable, batch_size, max_seq_length)
            for place in random.permutation(len(pool)):
                yield pad_batch(pool[place], max_seq_length)
        if not found:
            _refuse_empty(max_seq_length)
        epoch += 1


def _refuse_empty(max_seq_length: int) -> None:
    raise DoRAError(
        f"no row has a target token within max_seq_length {max_seq_length}: raise it, "
        "or train on the prompt too (no mask_prompt)."
    )
