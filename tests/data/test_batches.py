import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.data.batches import batches_once, pack_batch, pad_batch, padded_width
from mlx_dora.data.targets import Example


def rows_of(lengths: list[int]) -> list[Example]:
    return [([i + 1] * length, 0) for i, length in enumerate(lengths)]


def firsts(tokens: mx.array) -> list[int]:
    return np.array(tokens)[:, 0].tolist()


@pytest.mark.parametrize(
    ("longest", "limit", "width"),
    [(2, 2048, 9), (9, 2048, 9), (10, 2048, 17), (100, 64, 64), (300, 9000, 305)],
)
def test_rows_are_cut_and_padded(longest: int, limit: int, width: int) -> None:
    tokens, lengths = pad_batch(rows_of([longest, 2]), limit)
    assert tokens.shape == (2, width)
    assert lengths.tolist() == [[0, min(longest, limit)], [0, 2]]
    expected = [1] * min(longest, limit)
    assert tokens[0].tolist() == expected + [0] * (width - len(expected))


def test_padding_is_at_most_a_sixteenth_and_widths_are_few() -> None:
    widths = [padded_width(length, 10**6) for length in range(2, 5000)]
    for length, width in enumerate(widths, start=2):
        assert 0 <= width - length < max(8, length / 16)
    assert len(set(widths)) < 120


def test_packed_rows_tell_documents_and_targets() -> None:
    rows: list[list[Example]] = [
        [([5, 6, 7], 0), ([8, 9], 1)],
        [([1, 2, 3, 4], ((0, 2), (3, 4))), ([3, 3], 2)],
    ]
    tokens, marks = pack_batch(rows, 64)
    assert tokens.shape == (2, 9)
    assert marks.shape == (2, 9, 2)
    assert tokens[:, :6].tolist() == [[5, 6, 7, 8, 9, 0], [1, 2, 3, 4, 3, 3]]
    assert marks[0, :, 1].tolist() == [1, 1, 1, 2, 2, 0, 0, 0, 0]
    assert marks[0, :, 0].tolist() == [0, 1, 1, 0, 1, 0, 0, 0, 0]
    assert marks[1, :, 0].tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 0]


def test_spans_are_cut_with_their_row() -> None:
    _, marks = pad_batch([([1] * 9, ((2, 4), (6, 9))), ([1] * 3, 1)], 7)
    assert marks.shape == (2, 7, 1)
    assert marks[0, :, 0].tolist() == [0, 0, 1, 1, 0, 0, 1]
    assert marks[1, :, 0].tolist() == [0, 1, 1, 0, 0, 0, 0]


def test_a_part_of_the_data_is_spread_over_it_and_always_the_same() -> None:
    data = rows_of([4] * 40)
    first = [firsts(t) for t, _ in batches_once(data, 2, 64, num_batches=2)]
    again = [firsts(t) for t, _ in batches_once(data, 2, 64, num_batches=2)]
    assert first == again == [[1, 11], [21, 31]]
