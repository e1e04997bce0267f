"""Groups of rows of one width."""

from itertools import combinations

import numpy as np
import pytest

from mlx_dora.data import widths
from mlx_dora.data.widths import MOST_SHAPES, Group, group_by_width


def cost(groups: list[Group], batch_tokens: int) -> float:
    rows = sum(sum(group.sizes) * (group.width - 1) for group in groups)
    return rows + sum(len(group.sizes) for group in groups) * batch_tokens / 32


def shapes(groups: list[Group]) -> set[tuple[int, int]]:
    return {(size, group.width) for group in groups for size in group.sizes}


def cheapest(lengths: list[int], batch_tokens: int, ranks: int, most: int) -> float:
    """The least cost of all partitions, by trying each."""
    ends = sorted(set(lengths))
    least = float("inf")
    for count in range(len(ends)):
        for cuts in combinations(ends[:-1], count):
            options = [(0, 0.0)]  # shapes, cost
            below = 0
            for end in (*cuts, ends[-1]):
                rows = sum(below < n <= end for n in lengths)
                below = end
                units = -(-rows // ranks)
                batches = -(-units // (batch_tokens // end // ranks))
                extra = batches * batch_tokens / 32
                even = batches * -(-units // batches) * ranks * (end - 1) + extra
                own = units * ranks * (end - 1) + extra
                options = [
                    (used + kinds, total + price)
                    for used, total in options
                    for kinds, price in ((1, even), (2, own))
                ]
            least = min([least, *(total for used, total in options if used <= most)])
    return least


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("most", [2, 3, 5, 16])
@pytest.mark.parametrize("seed", range(3))
def test_no_partition_costs_less(
    ranks: int, most: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widths, "MOST_SHAPES", most)
    lengths = np.random.default_rng(seed).choice(range(2, 40), 9).tolist() * 3
    groups = group_by_width(lengths, 130, ranks)
    assert len(shapes(groups)) <= most
    assert cost(groups, 130) == pytest.approx(cheapest(lengths, 130, ranks, most))


LENGTHS = {
    "short": np.random.default_rng(0).integers(6, 40, size=2000).tolist(),
    "long tail": np.minimum(
        np.exp(np.random.default_rng(1).normal(5, 0.5, size=2500)).astype(int) + 2, 512
    ).tolist(),
    "one length": [77] * 500,
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("batch_tokens", [1024, 8192])
@pytest.mark.parametrize("name", LENGTHS)
def test_few_shapes_are_nearly_full(name: str, batch_tokens: int, ranks: int) -> None:
    lengths = LENGTHS[name]
    groups = group_by_width(lengths, batch_tokens, ranks)
    assert sum(group.rows for group in groups) == len(lengths)
    assert len(shapes(groups)) <= MOST_SHAPES
    for rows, width in shapes(groups):
        assert rows * width <= batch_tokens
        assert rows % ranks == 0
    inputs = sum(sum(group.sizes) * (group.width - 1) for group in groups)
    padding = 1 - (sum(lengths) - len(lengths)) / inputs
    # Sixteen widths leave 5 % and more of a distribution as broad as the long tail's.
    assert padding <= (0.06 if name == "long tail" else 0.05)
    if batch_tokens == 8192:  # many rows a batch: batches are nearly full
        count = sum(len(group.sizes) for group in groups)
        assert count <= 1.1 * sum(lengths) / batch_tokens + MOST_SHAPES / 2


def test_thousands_of_lengths_are_grouped_at_once() -> None:
    lengths = np.random.default_rng(2).integers(2, 30_000, size=20_000).tolist()
    groups = group_by_width(lengths, 65_536)
    assert sum(group.rows for group in groups) == len(lengths)
    assert groups[-1].width == max(lengths)
    assert len(shapes(groups)) <= MOST_SHAPES


def test_few_rows_do_not_become_many_batches() -> None:
    lengths = [10, 20, 30, 40, 50, 60]
    assert len(group_by_width(lengths, 4096)) == 1
