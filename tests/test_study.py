"""The grid of the study asks for each run once, and for more around the best rate."""

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.processes import ROOT


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "when")
    import decide  # pyright: ignore[reportMissingImports]

    yield decide
    sys.modules.pop("decide")


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "when")
    import grid  # pyright: ignore[reportMissingImports]

    yield grid
    sys.modules.pop("grid")


def finish(grid: Any, cell: Any, loss: Callable[[int], float | None]) -> dict[Any, Any]:
    """Run a cell to its end, with validation losses by the place of the rate."""
    results: dict[Any, Any] = {}
    for _ in range(10):
        jobs = grid.wanted(cell, results)
        for job in jobs:
            assert job not in results
            results[job] = {"valid_loss": loss(job.place)}
    assert not grid.wanted(cell, results)
    return results


def seeds_by_place(results: dict[Any, Any]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for job in results:
        counts[job.place] = counts.get(job.place, 0) + 1
    return dict(sorted(counts.items()))


def test_five_seeds_run_around_the_best_rate(grid: Any) -> None:
    cell = grid.Cell("topics", "dense", "dora", 4)
    results = finish(grid, cell, lambda place: abs(place - 3))
    assert seeds_by_place(results) == {0: 3, 1: 3, 2: 5, 3: 5, 4: 5, 5: 3, 6: 3}
    assert grid.best_place(cell, results) == 3
    assert [cell.rate(place) for place in (0, 3, 6)] == [5e-4, 4e-3, 3.2e-2]


def test_a_rate_is_added_where_the_best_is_the_last(grid: Any) -> None:
    cell = grid.Cell("topics", "dense", "full")
    results = finish(grid, cell, lambda place: abs(place - 7.2))
    assert seeds_by_place(results) == {
        **dict.fromkeys(range(6), 3),
        **dict.fromkeys((6, 7, 8), 5),
    }
    endless = finish(grid, cell, lambda place: -place)  # at most two rates are added
    assert seeds_by_place(endless) == {**dict.fromkeys(range(7), 3), 7: 5, 8: 5}


def test_a_failed_run_is_never_the_best(grid: Any) -> None:
    cell = grid.Cell("topics", "dense", "dora", 4)
    results = finish(grid, cell, lambda place: None if place > 4 else 5 - place)
    assert grid.best_place(cell, results) == 4


def test_lora_also_runs_with_the_numbers_and_the_time_of_dora(grid: Any) -> None:
    cell = grid.Cell("topics", "dense", "lora", 4)
    results = finish(grid, cell, lambda place: abs(place - 2))
    jobs = [
        *grid.equal_parameters(cell, results),
        *grid.equal_time(cell, results),
    ]
    assert len(jobs) == len({*jobs}) == 3 * 5 + 5
    assert {job.place for job in jobs if job.cell.equal_to} == {1, 2, 3}
    assert {job.cell.steps for job in jobs if not job.cell.equal_to} == {53}
    assert not {*jobs} & {*results}
    for other in (
        grid.Cell("topics", "4-bit", "lora", 4),
        grid.Cell("topics", "dense", "dora", 4),
    ):
        assert grid.equal_parameters(other, results) == []
        assert grid.equal_time(other, results) == []


def test_the_grid_has_as_many_runs_as_the_plan_says(grid: Any) -> None:
    cells = grid.main_cells()
    assert len(cells) == len({*cells}) == 3 * (2 * 10 + 1)
    runs = sum(len(finish(grid, cell, lambda place: abs(place - 3))) for cell in cells)
    lora = [c for c in cells if (c.base, c.method) == ("dense", "lora")]
    assert runs + 20 * len(lora) == 1881


def run_part(grid: Any, part: str, most: int = 10_000) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for job, _ in zip(grid.jobs(results, part), range(most), strict=False):
        assert job not in results
        results[job] = {"valid_loss": abs(job.place - 3.2)}
    return results


def test_parts_share_the_runs_of_the_whole(grid: Any) -> None:
    whole = run_part(grid, "0/1")
    assert len(whole) == 1881
    parts = [run_part(grid, part) for part in ("0/2", "1/2")]
    assert parts[0].keys() | parts[1].keys() == whole.keys()
    assert not parts[0].keys() & parts[1].keys()
    assert abs(len(parts[0]) - len(parts[1])) < 0.1 * len(whole)


def test_a_task_ends_before_the_next_and_equal_time_comes_last(grid: Any) -> None:
    order = [*run_part(grid, "0/1")]
    tables = [(job.cell.task, job.cell.base) for job in order if job.cell.steps == 48]
    changes = [b for a, b in pairwise(tables) if a != b]
    assert (tables[0], *changes) == grid.TABLES
    assert {job.cell.steps for job in order[-45:]} == {53}
    # An interrupted study goes on where it stopped.
    begun = run_part(grid, "0/1", 700)
    assert next(grid.jobs(begun)) == order[700]


def test_topics_are_balanced_and_split_by_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "when")
    import tasks  # pyright: ignore[reportMissingImports]

    splits = tasks.topics()
    assert {name: len(rows) for name, rows in splits.items()} == tasks.SIZES
    asked = [question for rows in splits.values() for question, _ in rows]
    assert len(asked) == len({*asked})
    for rows in splits.values():
        labels = [label for _, label in rows]
        assert {labels.count(topic) for topic in tasks.TOPICS} == {len(rows) // 4}
    assert tasks.topics() == splits
    for name in ("tasks", "_made_tasks"):
        sys.modules.pop(name)


def test_a_difference_is_paired_by_seed_and_row(decide: Any) -> None:
    draw = np.random.default_rng(1)
    hard = draw.uniform(1, 50, 100)  # rows differ much more than methods do
    second = hard * draw.uniform(0.9, 1.1, (5, 1))
    better = decide.difference((0.95 * second, second))
    assert better.mean == pytest.approx(-0.05)
    assert -0.0501 < better.low <= better.high < -0.0499
    assert better.p < 1e-3
    assert better.verdict(better.p) == "better"
    assert decide.difference((1.05 * second, second)).verdict(0.01) == "worse"
    assert decide.difference((0.999 * second, second)).verdict(0.01) == "alike"
    noisy = second * draw.uniform(0.2, 1.8, (5, 100))
    unclear = decide.difference((noisy, second))
    assert unclear.p > 0.05
    assert unclear.verdict(unclear.p) == "undecided"


def test_an_interval_is_that_of_drawing_seeds_and_rows(decide: Any) -> None:
    draw = np.random.default_rng(2)
    second = draw.uniform(1, 3, (8, 30))
    first = second + draw.normal(0, 0.3, (8, 1)) + draw.normal(0, 0.3, (8, 30))
    shares = []
    for _ in range(10_000):
        s, r = draw.integers(8, size=8), draw.integers(30, size=30)
        ours, theirs = first[s][:, r].sum(), second[s][:, r].sum()
        shares.append((ours - theirs) / theirs)
    result = decide.difference((first, second))
    low, high = np.quantile(shares, [0.025, 0.975])
    assert result.low == pytest.approx(low, abs=0.04 * (high - low))
    assert result.high == pytest.approx(high, abs=0.04 * (high - low))
    assert result.mean == pytest.approx(first.sum() / second.sum() - 1)


def test_a_contrast_is_the_difference_of_two_paired_differences(decide: Any) -> None:
    draw = np.random.default_rng(3)
    lora = draw.uniform(1, 50, (5, 100))
    common = draw.uniform(0.5, 1.5, (5, 100))  # noise that both pairs share
    low = (0.9 * common * lora, common * lora)
    high = (0.97 * common * lora, common * lora)
    more = decide.contrast(low, high)
    assert more.mean == pytest.approx(-0.07)
    assert more.high - more.low < 1e-9
    assert more.verdict(more.p) == "better"
    assert decide.contrast(high, low).verdict(0.01) == "worse"
    assert decide.contrast(low, low).verdict(1.0) == "alike"


def test_rewards_are_compared_without_a_share(decide: Any) -> None:
    base = np.random.default_rng(4).uniform(0, 0.5, (5, 64))
    more = decide.shortfall((base + 0.1, base))
    assert (more.mean, more.low, more.high) == pytest.approx((-0.1, -0.1, -0.1))
    assert more.verdict(more.p, 0.02) == "better"


def test_signs_are_tested_with_the_binomial_distribution(decide: Any) -> None:
    assert decide.sign_test(0, 0) == 1
    assert decide.sign_test(3, 3) == 1
    assert decide.sign_test(10, 0) == decide.sign_test(0, 10) == 2 / 2**10
    assert decide.sign_test(8, 2) == pytest.approx(2 * (45 + 10 + 1) / 2**10)


def test_a_correlation_draws_whole_groups(decide: Any) -> None:
    draw = np.random.default_rng(5)
    x = np.repeat(draw.normal(size=15), 20)  # fifteen groups of twenty equal runs
    y = x + np.repeat(draw.normal(size=15), 20)
    groups = np.repeat(range(15), 20).tolist()
    values = []
    for _ in range(2000):
        drawn = np.concatenate(
            [np.arange(20) + 20 * g for g in draw.integers(15, size=15)]
        )
        values.append(decide.spearman(x[drawn], y[drawn]))
    grouped = decide.correlation(x, y, groups)
    low, high = np.quantile(values, [0.025, 0.975])
    assert grouped.low == pytest.approx(low, abs=0.06)
    assert grouped.high == pytest.approx(high, abs=0.06)
    single = decide.correlation(x, y, range(300))
    assert grouped.rho == single.rho
    assert grouped.high - grouped.low > 2 * (single.high - single.low)
    sure = decide.correlation(x, -x, groups)
    assert (sure.rho, sure.low, sure.high) == pytest.approx((-1, -1, -1))
    assert sure.is_decided


def test_corrected_p_values_are_holms(decide: Any) -> None:
    assert decide.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )


def test_ranges_of_rates_are_interpolated(decide: Any) -> None:
    flat = decide.octaves_within([0, 1, 2, 3, 4], [2.0, 1.005, 1.0, 1.01, 1.03])
    # Left: 1 octave and 0.005 of 0.995; right: 1 octave, then the bound itself.
    assert flat == pytest.approx(2 + 0.005 / 0.995)
    assert decide.octaves_within([0, 1], [1.0, float("inf")]) == 0


def test_rank_correlation_shares_tied_ranks(decide: Any) -> None:
    x = np.array([1.0, 2.0, 2.0, 30.0])
    assert decide.spearman(x, np.exp(x / 10)) == pytest.approx(1)
    assert decide.spearman(x, np.array([4.0, 2.0, 3.0, 1.0])) == pytest.approx(
        -0.9486833
    )
