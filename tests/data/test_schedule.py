import logging
from itertools import chain, islice

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.data.batches import padded_width
from mlx_dora.data.counts import RowCounts
from mlx_dora.data.packing import best_fit
from mlx_dora.data.schedule import Schedule
from mlx_dora.data.targets import Example
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import marked_targets

LENGTHS = np.random.default_rng(0).integers(2, 500, size=131).tolist()


def rows_of(lengths: list[int]) -> list[Example]:
    return [([i + 1] * length, 0) for i, length in enumerate(lengths)]


def firsts(tokens: mx.array) -> list[int]:
    return np.array(tokens)[:, 0].tolist()


def test_only_batches_between_two_buckets_mix_lengths() -> None:
    schedule = Schedule(rows_of(LENGTHS), 4, 2048, seed=1)
    mixed = 0
    for batch in schedule.epoch(0):
        widths = {padded_width(LENGTHS[i], 2048) for (i,) in batch}
        mixed += len(widths) > 1
    buckets = len({padded_width(n, 2048) for n in LENGTHS})
    assert mixed <= buckets
    tokens, targets = 0, 0
    for batch, marks in islice(schedule.batches(), len(schedule.epoch(0))):
        tokens += batch[:, 1:].size
        targets += int((marks[:, 1] - 1).sum())
    assert targets == sum(LENGTHS) - len(LENGTHS)
    assert targets / tokens > 0.95


def test_a_batch_larger_than_the_data_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    schedule = Schedule(rows_of([5, 6, 7]), 4, 64)
    expected = "batch_size is 4, but there are only 3 rows to learn from: every batch"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert expected in caplog.text
    assert [len(batch) for batch in schedule.epoch(0)] == [3]
    caplog.clear()
    Schedule(rows_of([5, 6, 7]), 3, 64)
    Schedule(rows_of([5, 6, 7]), 4, 64, batch_tokens=64)
    Schedule(rows_of([5, 6, 7]), 4, 64, packing=True)
    assert caplog.text == ""


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_have_every_example_once_in_different_batches(
    packing: bool,
) -> None:
    schedule = Schedule(rows_of(LENGTHS), 4, 600, seed=7, packing=packing)
    epochs = [schedule.epoch(number) for number in range(2)]
    for epoch in epochs:
        examples = list(chain.from_iterable(chain.from_iterable(epoch)))
        assert sorted(examples) == list(range(len(LENGTHS)))
    together = [{frozenset(chain(*batch)) for batch in epoch} for epoch in epochs]
    assert len(together[0] & together[1]) < len(together[0]) / 2
    again = Schedule(rows_of(LENGTHS), 4, 600, seed=7, packing=packing)
    assert again.epoch(1) == epochs[1]
    other = Schedule(rows_of(LENGTHS), 4, 600, seed=8, packing=packing)
    assert other.epoch(1) != epochs[1]


@pytest.mark.parametrize("packing", [False, True])
def test_batches_start_anywhere(packing: bool) -> None:
    schedule = Schedule(rows_of(LENGTHS), 4, 600, seed=2, packing=packing)
    total = schedule.length(2)
    assert total == len(schedule.epoch(0)) + len(schedule.epoch(1))
    whole = [tokens.tolist() for tokens, _ in islice(schedule.batches(), total + 2)]
    first = schedule.length(1)
    for start in (0, 1, first - 1, first, first + 3, total):
        tokens, _ = next(schedule.batches(start))
        assert tokens.tolist() == whole[start]


def test_processes_share_the_rows_of_each_batch() -> None:
    data = rows_of([4] * 9)
    schedule = Schedule(data, 4, 64)
    whole = [sorted(firsts(t)) for t, _ in islice(schedule.batches(), 3)]
    shared = [
        list(islice(schedule.batches(rank=rank, ranks=2), 3)) for rank in range(2)
    ]
    for batch, (first, _), (second, marks) in zip(whole, *shared, strict=True):
        if len(batch) == 1:
            assert firsts(first) == batch
            assert marks.tolist() == [[2, 2]]  # no target
        else:
            assert sorted(firsts(first) + firsts(second)) == batch


def test_packed_rows_are_nearly_full_and_within_the_length() -> None:
    schedule = Schedule(rows_of(LENGTHS), 4, 600, packing=True)
    rows = list(chain.from_iterable(schedule.epoch(0)))
    used = [sum(LENGTHS[i] for i in row) for row in rows]
    assert max(used) <= 600
    assert sum(used) / (600 * len(rows)) > 0.95


def test_best_fit_equals_a_plain_search() -> None:
    lengths = sorted(LENGTHS, reverse=True)[:60] + LENGTHS[:40]
    room: list[int] = []
    for length in lengths:
        fitting = [r for r in room if r >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(600 - length)
    boxes = best_fit(lengths, 600)
    assert sorted(chain(*boxes)) == list(range(len(lengths)))
    assert sorted(600 - sum(lengths[i] for i in box) for box in boxes) == sorted(room)


def test_fewer_rows_than_a_batch_are_enough() -> None:
    tokens, _ = next(Schedule(rows_of([5, 6]), 8, 2048).batches())
    assert tokens.shape == (2, 9)


def test_truncated_and_skipped_rows_are_counted_and_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data: list[Example] = [*rows_of([10, 80, 90]), ([9] * 70, 68), ([9], 0)]
    counts = RowCounts()
    with caplog.at_level(logging.WARNING):
        list(islice(Schedule(data, 2, 64, counts=counts).batches(), 10))
    assert counts == RowCounts(rows=5, truncated=3, skipped=2, longest=90)
    assert len(caplog.records) == 1
    assert "3 of 5 rows are longer than max_seq_length 64" in caplog.text
    assert "2 of 5 rows have no target token" in caplog.text


def test_data_without_any_target_is_refused() -> None:
    with pytest.raises(DoRAError, match="no row has a target token"):
        Schedule([([1, 2, 3], 3)], 2, 64)


def tokens_schedule(data: list[Example], tokens: int, ranks: int = 1) -> Schedule:
    return Schedule(data, 4, 600, seed=3, batch_tokens=tokens, ranks=ranks)


def test_batches_of_tokens_have_every_example_once() -> None:
    schedule = tokens_schedule(rows_of(LENGTHS), 1024)
    epochs = [schedule.epoch(number) for number in range(2)]
    for epoch in epochs:
        assert len(epoch) == schedule.length(1)
        examples = list(chain.from_iterable(chain.from_iterable(epoch)))
        assert sorted(examples) == list(range(len(LENGTHS)))
    assert epochs[0] != epochs[1]
    assert tokens_schedule(rows_of(LENGTHS), 1024).epoch(1) == epochs[1]
    count = len(epochs[0])
    assert schedule.ends(2, 4 * count) == [2 * count, 4 * count]


@pytest.mark.parametrize("masked", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_of_tokens_have_few_shapes_and_all_targets(
    ranks: int, masked: int
) -> None:
    """masked: nothing, prompts, or spans of answers."""
    data: list[Example] = [
        (tokens, (0, n // 2, ((1, 2), (n // 2, n - 1)))[masked])
        for tokens, _ in rows_of(LENGTHS)
        if (n := len(tokens)) > 5
    ]
    schedule = tokens_schedule(data, 2048, ranks)
    count = schedule.length(1)
    shares = [
        list(islice(schedule.batches(rank=rank, ranks=ranks), count))
        for rank in range(ranks)
    ]
    shapes, targets = set(), 0
    for parts in zip(*shares, strict=True):
        assert len({tokens.shape for tokens, _ in parts}) == 1
        shapes.add(parts[0][0].shape)
        assert sum(tokens.size for tokens, _ in parts) <= 2048
        for tokens, marks in parts:
            assert marks.ndim == (3 if masked == 2 else 2)
            targets += int(marked_targets(marks, tokens.shape[1] - 1).sum())
    assert len(shapes) <= 16
    usage = schedule.usage()
    assert usage.batches == count
    assert {(rows // ranks, width) for rows, width in usage.shapes} == shapes
    size = sum(part[0][:, 1:].size for part in chain(*shares))
    real = sum(len(tokens) - 1 for tokens, _ in data)
    assert usage.padding == pytest.approx(1 - real / size)
    assert targets == sum(
        len(t) - max(at, 1) if isinstance(at, int) else 1 + len(t) - 1 - len(t) // 2
        for t, at in data
    )


def test_batches_of_tokens_start_anywhere() -> None:
    schedule = tokens_schedule(rows_of(LENGTHS), 1024)
    total = schedule.length(2)
    whole = [tokens.tolist() for tokens, _ in islice(schedule.batches(), total + 2)]
    for start in (0, 1, total // 2, total // 2 + 3, total):
        tokens, _ = next(schedule.batches(start))
        assert tokens.tolist() == whole[start]


@pytest.mark.parametrize(("ranks", "needed"), [(1, "50"), (3, "150")])
def test_a_row_longer_than_the_budget_is_refused(ranks: int, needed: str) -> None:
    match = f"holds no row of 50 tokens.*at least {needed}, or lower max_seq_length"
    with pytest.raises(DoRAError, match=match):
        tokens_schedule(rows_of([50, 10]), 49, ranks)
    tokens_schedule(rows_of([50, 10]), 50 * ranks, ranks)


def test_usage_of_packed_and_fixed_batches() -> None:
    lengths = [9, 9, 5]
    usage = Schedule(rows_of(lengths), 2, 600).usage()
    assert usage.shapes == {(2, 9), (1, 9)}
    assert usage.batches == 2
    assert usage.padding == pytest.approx(1 - 20 / 24)
    packed = Schedule(rows_of(lengths), 2, 18, packing=True).usage()
    assert packed.shapes == {(2, 18)}
    assert packed.padding == pytest.approx(1 - (17 + 4) / 34)
