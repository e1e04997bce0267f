"""The batches of each epoch, a function of the seed and the epoch."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_dora.data.batches import (
    EMPTY,
    Batch,
    Examples,
    pack_batch,
    pad_batch,
    padded_width,
    unit_batch,
)
from mlx_dora.data.counts import RowCounts, refuse_empty
from mlx_dora.data.packing import best_fit
from mlx_dora.data.targets import Example
from mlx_dora.data.widths import group_by_width
from mlx_dora.errors import DoRAError

logger = logging.getLogger(__name__)

Row = tuple[int, ...]
"""Indices of the examples in a row: one, several if packed, none if it is empty.

Of a unit, the index of its first example.
"""

Plan = tuple[list[Row], int | None]
"""The rows of a batch, and their width if the batch does not determine it."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the batches of an epoch consist of.

    Args:
        batches: Number of batches.
        shapes: Shapes of the batches: rows and tokens. A compiled step is traced once
            for each.
        padding: Share of the input tokens that is padding.
    """

    batches: int
    shapes: frozenset[tuple[int, int]]
    padding: float


class Schedule:
    """The batches of every epoch, a function of only `seed` and the epoch.

    The constructor reads (and so tokenizes) every example once. An epoch contains each
    usable example once. Examples of equal padded length form a bucket, which is
    shuffled every epoch. Batches are taken from the buckets in turn, so that only a
    batch at the border of two buckets mixes lengths; then the batches are shuffled. One
    batch may be smaller than the others.

    With `batch_tokens`, every batch has as many rows of one width as fit into so many
    tokens. The widths suit the data (see `group_by_width`), and an epoch has at most
    16 shapes of batches. Every process gets rows of the same shape; rows without a
    target fill up its share.

    With `unit`, so many consecutive examples stay together in every batch, such as the
    chosen and the rejected answer of a pair: `batch_size` counts units, the longest
    example decides the width of a unit, and a unit is used if each of its examples is
    usable. See `unit_batch` for the batches.

    With `packing`, examples are concatenated into rows of up to `max_seq_length`
    tokens, longest first, each into the row where it leaves the least space (best fit).

    Args:
        dataset: The examples.
        batch_size: Rows per batch.
        max_seq_length: Examples are truncated to this many tokens.
        seed: Random seed of the order.
        packing: Whether to pack several examples into a row.
        batch_tokens: Maximum number of tokens per batch, instead of `batch_size`.
        ranks: Number of processes that share each batch.
        unit: Number of examples in a unit; None for single rows.
        counts: Updated with the number of truncated and skipped examples.

    Raises:
        DoRAError: If no example has a target token, or one is longer than a process's
            share of `batch_tokens`.
    """

    def __init__(
        self,
        dataset: Examples,
        batch_size: int,
        max_seq_length: int,
        *,
        seed: int = 0,
        packing: bool = False,
        batch_tokens: int | None = None,
        ranks: int = 1,
        unit: int | None = None,
        counts: RowCounts | None = None,
    ) -> None:
        assert unit is None or not packing, "units are not packed"
        counts = RowCounts() if counts is None else counts
        self._dataset = dataset
        self._batch_size = batch_size
        self._max_seq_length = max_seq_length
        self._seed = seed
        self._packing = packing
        self._ranks = ranks
        self._unit, size = unit, unit or 1
        usable, lengths = [], []
        for start in range(0, len(dataset), size):
            if length := counts.add_unit(dataset, start, size, max_seq_length):
                usable.append(start)
                lengths.append(length)
        if not usable:
            refuse_empty(counts, max_seq_length)
        if line := counts.describe(max_seq_length):
            logger.warning("%s", line)
        if len(usable) < batch_size and batch_tokens is None and not packing:
            logger.warning(
                "batch_size is %d, but there are only %d %s to learn from: every batch "
                "holds all of them",
                batch_size,
                len(usable),
                "rows" if unit is None else "groups of rows",
            )
        self._usable = np.array(usable)
        self._lengths = np.array(lengths)
        self._widths = np.array([padded_width(n, max_seq_length) for n in lengths])
        self._groups = []
        if batch_tokens is not None:
            if max(lengths) * ranks * size > batch_tokens:
                share = f" / {ranks} processes" if ranks > 1 else ""
                share += f" / {size} rows a pair" if size > 1 else ""
                raise DoRAError(
                    f"batch_tokens {batch_tokens}{share} holds no row of "
                    f"{max(lengths)} tokens, the longest: raise it to at least "
                    f"{max(lengths) * ranks * size}, or lower max_seq_length."
                )
            self._groups = group_by_width(lengths, batch_tokens // size, ranks)

    def epoch(self, number: int) -> list[list[Row]]:
        """The batches of an epoch, in order."""
        return [rows for rows, _ in self._epoch(number)]

    def _epoch(self, number: int) -> list[Plan]:
        random = np.random.default_rng([self._seed, number])
        order = random.permutation(len(self._usable))
        if self._groups:
            batches = self._of_one_width(order)
        else:
            batches = [(rows, None) for rows in self._of_one_size(order, random)]
        return [batches[place] for place in random.permutation(len(batches))]

    def _of_one_size(
        self, order: np.ndarray, random: np.random.Generator
    ) -> list[list[Row]]:
        order = order[np.argsort(self._widths[order], kind="stable")]
        rows: list[Row] = [(int(self._usable[place]),) for place in order]
        if self._packing:
            longest_first = order[::-1]
            lengths = self._lengths[longest_first].tolist()
            rows = [
                tuple(int(self._usable[longest_first[place]]) for place in places)
                for places in best_fit(lengths, self._max_seq_length)
            ]
            rows = [rows[place] for place in random.permutation(len(rows))]
        size = self._batch_size
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    def _of_one_width(self, order: np.ndarray) -> list[Plan]:
        batches: list[Plan] = []
        longest = 0
        for group in self._groups:
            lengths = self._lengths[order]
            members = order[(lengths > longest) & (lengths <= group.width)]
            rows: list[Row] = [(int(self._usable[place]),) for place in members]
            rows += [()] * (sum(group.sizes) - len(rows))
            at = 0
            for size in group.sizes:
                batches.append((rows[at : at + size], group.width))
                at += size
            longest = group.width
        return batches

    def length(self, epochs: int) -> int:
        """Number of batches in the first `epochs` epochs."""
        if self._packing:  # differs from epoch to epoch
            return sum(len(self.epoch(number)) for number in range(epochs))
        if self._groups:
            return epochs * sum(len(group.sizes) for group in self._groups)
        return epochs * -(-len(self._usable) // self._batch_size)

    def usage(self, number: int = 0) -> "Usage":
        """Measure the batches of an epoch, before the processes share their rows."""
        lengths = dict(zip(self._usable.tolist(), self._lengths.tolist(), strict=True))
        shapes, tokens, size = set(), 0, self._unit or 1
        epoch = self._epoch(number)
        for rows, width in epoch:
            longest = max(sum(lengths[index] for index in row) for row in rows)
            width = width or padded_width(longest, self._max_seq_length)
            shapes.add((size * len(rows), width))
            tokens += size * len(rows) * (width - 1)
        # A row's first token is no input beside the others: it has no predecessor.
        rows = sum(len(rows) - rows.count(()) for rows, _ in epoch)
        real = int(self._lengths.sum()) - rows
        if size > 1:
            real = sum(
                min(len(self._dataset[start + place][0]), self._max_seq_length) - 1
                for start in self._usable.tolist()
                for place in range(size)
            )
        return Usage(
            batches=len(epoch), shapes=frozenset(shapes), padding=1 - real / tokens
        )

    def ends(self, epochs: int, batches: int) -> list[int]:
        """Number of batches done after every `epochs` epochs, up to `batches`."""
        ends, done, number = [], 0, 0
        while done < batches:
            done += self.length(1) if not self._packing else len(self.epoch(number))
            number += 1
            if number % epochs == 0:
                ends.append(done)
        return ends

    def batches(
        self, start: int = 0, rank: int = 0, ranks: int = 1, *, alike: bool = False
    ) -> Iterator[Batch]:
        """Yield batches indefinitely.

        Args:
            start: Number of batches to skip, those of an earlier, interrupted run.
            rank: Rank of this process among those that share each batch's rows.
            ranks: Number of processes. A process that gets no row of a small batch
                gets a row without targets.
            alike: Give every process a batch of the same shape.
        """
        number = 0
        assert not self._groups or ranks == self._ranks
        while True:
            epoch = self._epoch(number)
            for rows, width in epoch[start:]:
                if alike:
                    width = width or self._width(rows)
                    rows = [*rows, *[()] * (-len(rows) % ranks)]
                yield self._make(rows[rank::ranks], width)
            start = max(start - len(epoch), 0)
            number += 1

    def _width(self, rows: Sequence[Row]) -> int:
        """Width of a batch of these rows."""
        most = self._max_seq_length
        lengths = [
            sum(min(len(self._dataset[index][0]), most) for index in row)
            for row in rows
        ]
        return padded_width(max(lengths), most)

    def _make(self, rows: Sequence[Row], width: int | None) -> Batch:
        if self._unit is not None:
            starts = [row[0] if row else -1 for row in rows] or [-1]
            return unit_batch(
                self._dataset, starts, self._unit, self._max_seq_length, width
            )
        examples = [[self._dataset[index] for index in row] for row in rows]
        examples = examples or [[EMPTY]]
        if self._packing:
            return pack_batch(examples, self._max_seq_length, width)
        # Targets of empty rows have the form of the others', for marks of one shape.
        is_spans = any(row and not isinstance(row[0][1], int) for row in examples)
        empty: Example = (EMPTY[0], ()) if is_spans else EMPTY
        single = [row[0] if row else empty for row in examples]
        return pad_batch(single, self._max_seq_length, width)
