"""MLX's memory settings while a model trains."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora.train import memory
from mlx_dora.train.memory import trim_cache, wired_memory


def test_the_cache_is_freed_past_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    monkeypatch.setattr(mx, "clear_cache", lambda: freed.append(1))
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 1000)
    trim_cache(1000)
    assert not freed
    trim_cache(999)
    assert freed


def test_the_wired_limit_is_raised_temporarily_on_metal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[int] = []

    def wire(limit: int) -> int:
        limits.append(limit)
        return 7

    monkeypatch.setattr(mx, "set_wired_limit", wire)
    with wired_memory():
        assert bool(limits) == mx.metal.is_available()
    limits.clear()
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(
        memory.mx, "device_info", lambda: {"max_recommended_working_set_size": 99}
    )
    with pytest.raises(KeyError), wired_memory():
        raise KeyError
    assert limits == [99, 7]


@pytest.mark.parametrize(("threshold", "clears"), [(0, True), (1 << 40, False)])
def test_training_keeps_to_the_threshold(
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    threshold: int,
    clears: bool,
) -> None:
    freed: list[int] = []
    monkeypatch.setattr(mx, "clear_cache", lambda: freed.append(1))
    run(iters=1, clear_cache_threshold=threshold)
    assert bool(freed) == clears
