"""Thin products run on one BLAS thread; dense ones on those that were set."""

from typing import Any

import mlx.nn as nn
import pytest

from mlx_dora import openblas
from mlx_dora.analyze.compare import compare_adapters
from mlx_dora.errors import DoRAError
from mlx_dora.merge.adapters.dense import Options
from mlx_dora.merge.adapters.merge import merge_adapters_report
from tests.merge.adapters.test_merge import known_of, train

SET = 4


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of threads of a simulated BLAS."""
    counts = [SET]
    one = (lambda n: counts.__setitem__(0, n), lambda: counts[0])
    monkeypatch.setattr(openblas, "_loaded", lambda: [one])
    return counts


@pytest.mark.parametrize(
    ("method", "space", "granularity", "expected"),
    [
        ("karcher", None, None, 1),
        ("task_arithmetic", None, None, 1),
        ("tsv", "core", None, 1),
        ("ties", "knots", None, 1),
        ("iso", None, None, 1),
        ("fisher", None, "row", 1),
        ("fisher", None, "element", SET),
        ("ties", None, None, SET),
        ("task_arithmetic", "weight", None, SET),
    ],
)
def test_a_merge_limits_the_threads_of_thin_products(
    tiny_model: nn.Module,
    threads: list[int],
    method: str,
    space: str | None,
    granularity: str | None,
    expected: int,
) -> None:
    adapters = [train(tiny_model, seed) for seed in (1, 2)]
    fisher = granularity and known_of(tiny_model, adapters, granularity)
    seen = []
    merge_adapters_report(
        adapters,
        model=tiny_model,
        method=method,
        options=Options(space=space),
        fisher=fisher or None,
        progress=lambda *_: seen.append(threads[0]),
    )
    assert {*seen} == {expected}
    assert threads == [SET]


def test_a_comparison_runs_on_one_thread(
    tiny_model: nn.Module, threads: list[int]
) -> None:
    adapters: list[Any] = [train(tiny_model, seed) for seed in (1, 2)]
    seen = []
    compare_adapters(adapters, tiny_model, progress=lambda *_: seen.append(threads[0]))
    assert {*seen} == {1}
    assert threads == [SET]
    with pytest.raises(DoRAError):
        compare_adapters(adapters[:1], tiny_model)
    assert threads == [SET]
