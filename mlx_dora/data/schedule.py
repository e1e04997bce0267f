"""The batches of each epoch, a function of the seed and the epoch."""

import logging
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from mlx_dora.data.batches import Batch, Examples, pack_batch, pad_batch, padded_width
from mlx_dora.data.counts import RowCounts, refuse_empty

logger = logging.getLogger(__name__)

Row = tuple[int, ...]
"""Indices of the examples in a row: one, or several if packed."""


class Schedule:
    """The batches of every epoch, a function of only `seed` and the epoch.

    The constructor reads (and so tokenizes) every example once. An epoch contains each
    usable example once. Examples of equal padded length form a bucket, which is
    shuffled every epoch. Batches are taken from the buckets in turn, so that only a
    batch at the border of two buckets mixes lengths; then the batches are shuffled. One
    batch may be smaller than the others.

    With `packing`, examples are concatenated into rows of up to `max_seq_length`
    tokens, longest first, each into the row where it leaves the least space (best fit).

    Args:
        dataset: The examples.
        batch_size: Rows per batch.
        max_seq_length: Examples are truncated to this many tokens.
        seed: Random seed of the order.
        packing: Whether to pack several examples into a row.
        counts: Updated with the number of truncated and skipped examples.

    Raises:
        DoRAError: If no example has a target token.
    """

    def __init__(
        self,
        dataset: Examples,
        batch_size: int,
        max_seq_length: int,
        *,
        seed: int = 0,
        packing: bool = False,
        counts: RowCounts | None = None,
    ) -> None:
        counts = RowCounts() if counts is None else counts
        self._dataset = dataset
        self._batch_size = batch_size
        self._max_seq_length = max_seq_length
        self._seed = seed
        self._packing = packing
        usable, lengths = [], []
        for index in range(len(dataset)):
            example = dataset[index]
            if counts.add(example, max_seq_length):
                usable.append(index)
                lengths.append(min(len(example[0]), max_seq_length))
        if not usable:
            refuse_empty(counts, max_seq_length)
        if line := counts.describe(max_seq_length):
            logger.warning("%s", line)
        self._usable = np.array(usable)
        self._lengths = np.array(lengths)
        self._widths = np.array([padded_width(n, max_seq_length) for n in lengths])

    def epoch(self, number: int) -> list[list[Row]]:
        """The batches of an epoch, in order."""
        random = np.random.default_rng([self._seed, number])
        order = random.permutation(len(self._usable))
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
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        return [batches[place] for place in random.permutation(len(batches))]

    def length(self, epochs: int) -> int:
        """Number of batches in the first `epochs` epochs."""
        if not self._packing:  # the same in every epoch
            return epochs * -(-len(self._usable) // self._batch_size)
        return sum(len(self.epoch(number)) for number in range(epochs))

    def ends(self, epochs: int, batches: int) -> list[int]:
        """Number of batches done after every `epochs` epochs, up to `batches`."""
        ends, done, number = [], 0, 0
        while done < batches:
            done += self.length(1) if not self._packing else len(self.epoch(number))
            number += 1
            if number % epochs == 0:
                ends.append(done)
        return ends

    def batches(self, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield batches indefinitely.

        Args:
            start: Number of batches to skip, those of an earlier, interrupted run.
            rank: Rank of this process among those that share each batch's rows.
            ranks: Number of processes. A process that gets no row of a small batch
                gets a row without targets.
        """
        number = 0
        while True:
            epoch = self.epoch(number)
            for rows in epoch[start:]:
                yield self._make(rows[rank::ranks])
            start = max(start - len(epoch), 0)
            number += 1

    def _make(self, rows: Sequence[Row]) -> Batch:
        examples = [[self._dataset[index] for index in row] for row in rows]
        examples = examples or [[([0, 0], 2)]]
        if self._packing:
            return pack_batch(examples, self._max_seq_length)
        return pad_batch([row[0] for row in examples], self._max_seq_length)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into boxes, each into the fullest box that still has room for it.

    Args:
        lengths: Lengths of the items, in the order of packing, at most `capacity`.
        capacity: Capacity of each box.

    Returns:
        For each box, the indices of its items in `lengths`.
    """
    boxes: list[list[int]] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)  # room -> boxes
    rooms: list[int] = []  # keys of by_room that have boxes, sorted
    for place, length in enumerate(lengths):
        nearest = bisect_left(rooms, length)
        if nearest == len(rooms):
            box, room = len(boxes), capacity
            boxes.append([])
        else:
            room = rooms[nearest]
            box = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(nearest)
        boxes[box].append(place)
        left = room - length
        if not by_room[left]:
            insort(rooms, left)
        by_room[left].append(box)
    return boxes
