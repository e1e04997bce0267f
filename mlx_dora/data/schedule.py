"""Which examples share a batch, epoch after epoch: a function of seed and epoch."""

import logging
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from mlx_dora.data.batches import Batch, Examples, pack_batch, pad_batch, padded_width
from mlx_dora.data.counts import RowCounts, refuse_empty

logger = logging.getLogger(__name__)

Row = tuple[int, ...]
"""Numbers of the examples in one row: one of them, or several packed."""


class Schedule:
    """The batches of every epoch, each a function of `seed` and the epoch alone.

    All examples are looked at (and so tokenised) once, here. In an epoch each usable
    one comes once. Those whose padded length is the same are a bucket, put in a new
    order every epoch; batches are cut from one bucket after the other, so that only
    those between two buckets mix lengths, and then shuffled. The last one may be
    smaller.

    With `packing`, examples are laid end to end in rows of up to `max_seq_length`
    tokens: the longest first, each where the least room is left over (best fit).

    Args:
        dataset: The examples.
        batch_size: Rows in a batch.
        max_seq_length: Examples are cut to this many tokens.
        seed: Makes the order.
        packing: Lay several examples in a row.
        counts: Filled with what happened to the examples.

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
        if not self._packing:  # the same in each
            return epochs * -(-len(self._usable) // self._batch_size)
        return sum(len(self.epoch(number)) for number in range(epochs))

    def ends(self, epochs: int, batches: int) -> list[int]:
        """How many batches are done after every `epochs` epochs, up to `batches`."""
        found, done, number = [], 0, 0
        while done < batches:
            done += self.length(1) if not self._packing else len(self.epoch(number))
            number += 1
            if number % epochs == 0:
                found.append(done)
        return found

    def batches(self, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Batches without end.

        Args:
            start: How many batches to pass over: those of an earlier, stopped run.
            rank: Of several processes that share each batch's rows, which one this is.
            ranks: How many they are. One that gets no row of a small batch gets a row
                without any target.
        """
        number = 0
        while True:
            epoch = self.epoch(number)
            for rows in epoch[start:]:
                yield self._make(rows[rank::ranks])
            start = max(start - len(epoch), 0)
            number += 1

    def _make(self, rows: Sequence[Row]) -> Batch:
        found = [[self._dataset[index] for index in row] for row in rows]
        found = found or [[([0, 0], 2)]]
        if self._packing:
            return pack_batch(found, self._max_seq_length)
        return pad_batch([row[0] for row in found], self._max_seq_length)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put things into boxes, each into the fullest one that still takes it.

    Args:
        lengths: Of the things, in the order in which they come; none over `capacity`.
        capacity: Of each box.

    Returns:
        The places in `lengths` of each box's things.
    """
    boxes: list[list[int]] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)  # room -> boxes
    rooms: list[int] = []  # the keys that have boxes, sorted
    for place, length in enumerate(lengths):
        found = bisect_left(rooms, length)
        if found == len(rooms):
            box, room = len(boxes), capacity
            boxes.append([])
        else:
            room = rooms[found]
            box = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(found)
        boxes[box].append(place)
        left = room - length
        if not by_room[left]:
            insort(rooms, left)
        by_room[left].append(box)
    return boxes
