import logging
from itertools import chain, islice, pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.batches import (
    RowCounts,
    batches_once,
    iterate_batches,
    pad_batch,
)
from mlx_dora.evaluate.data import Example


def rows_of(lengths: list[int]) -> list[Example]:
    return [([i + 1] * length, 0) for i, length in enumerate(lengths)]


def firsts(tokens: mx.array) -> list[int]:
    return np.array(tokens)[:, 0].tolist()


@pytest.mark.parametrize(
    ("longest", "limit", "width"),
    [(2, 2048, 33), (33, 2048, 33), (34, 2048, 65), (100, 64, 64), (40, 50, 50)],
)
def test_inputs_are_padded_to_a_multiple_of_32(
    longest: int, limit: int, width: int
) -> None:
    tokens, lengths = pad_batch(rows_of([longest, 2]), limit)
    assert tokens.shape == (2, width)
    assert lengths.tolist() == [[0, min(longest, limit)], [0, 2]]
    expected = [1] * min(longest, limit)
    assert tokens[0].tolist() == expected + [0] * (width - len(expected))


def test_rows_of_like_length_share_a_batch() -> None:
    lengths = np.random.default_rng(0).integers(2, 500, size=64).tolist()
    spans = []
    for _, found in islice(iterate_batches(rows_of(lengths), 4, 2048, seed=1), 16):
        column = np.array(found)[:, 1].tolist()
        spans.append((min(column), max(column)))
    spans.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_an_epoch_has_every_row_once_and_the_next_another_order() -> None:
    data = rows_of(list(range(2, 25)))
    batches = iterate_batches(data, 4, 2048, seed=7)
    epochs = []
    for _ in range(2):
        seen = [firsts(t) for t, _ in islice(batches, 6)]
        assert sorted(chain(*seen)) == list(range(1, 24))
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    again = [firsts(t) for t, _ in islice(iterate_batches(data, 4, 99, seed=7), 6)]
    assert again == epochs[0]


def test_fewer_rows_than_a_batch_are_enough() -> None:
    tokens, _ = next(iterate_batches(rows_of([5, 6]), 8, 2048))
    assert tokens.shape == (2, 33)


def test_cut_and_left_out_rows_are_counted_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = [*rows_of([10, 80, 90]), ([9] * 70, 68), ([9], 0)]
    counts = RowCounts()
    with caplog.at_level(logging.WARNING):
        list(islice(iterate_batches(data, 2, 64, counts=counts), 10))
    assert counts == RowCounts(rows=5, truncated=3, skipped=2, longest=90)
    assert len(caplog.records) == 1
    assert "3 of 5 rows are longer than max_seq_length 64" in caplog.text
    assert "2 of 5 rows have no target token" in caplog.text


def test_data_without_any_target_is_refused() -> None:
    with pytest.raises(DoRAError, match="no row has a target token"):
        next(iterate_batches([([1, 2, 3], 3)], 2, 64))


def test_rows_are_tokenised_pool_by_pool() -> None:
    class Lazy:
        asked = 0

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> Example:
            self.asked += 1
            return [1] * (index % 7 + 2), 0

    lazy = Lazy()
    next(iterate_batches(lazy, 2, 64))
    assert lazy.asked == 200


def test_a_part_of_the_data_is_spread_over_it_and_always_the_same() -> None:
    data = rows_of([4] * 40)
    first = [firsts(t) for t, _ in batches_once(data, 2, 64, num_batches=2)]
    again = [firsts(t) for t, _ in batches_once(data, 2, 64, num_batches=2)]
    assert first == again == [[1, 11], [21, 31]]
