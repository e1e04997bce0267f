from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.kernels import trial
from mlx_dora.kernels.case import Case
from mlx_dora.kernels.trial import Job

NORM = Case("adapted_norm", mx.float32, 24, 32, 4)


def test_an_error_of_ours_is_not_taken_for_a_refusal() -> None:
    def refuse(*_: mx.array) -> mx.array:
        raise DoRAError("a bug")

    job = Job(inputs=lambda _: (mx.ones(3),), kernel=refuse, plain=lambda x: x)
    with pytest.raises(DoRAError, match="a bug"):
        trial.check(NORM, job)


def test_the_clock_is_read_around_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(trial.time, "perf_counter", lambda: now[0])
    seeds: list[int] = []
    calls = {"kernel": 0, "plain": 0}

    def inputs(seed: int) -> tuple[mx.array, ...]:
        seeds.append(seed)
        return mx.full((1 << 20,), seed), mx.array([1.0])

    def side(name: str, cost: float) -> Any:
        def run(x: mx.array, link: mx.array) -> mx.array:
            calls[name] += 1
            now[0] += cost
            return x[:4] * link

        return run

    job = Job(
        inputs=inputs, kernel=side("kernel", 2e-4), plain=side("plain", 3e-4), linked=1
    )
    monkeypatch.setattr(trial, "_FRESH_BYTES", 40 << 20)
    kernel, plain = trial.rounds(job)
    assert kernel == pytest.approx([2e-4] * 7)
    assert plain == pytest.approx([3e-4] * 7)
    assert len(set(seeds)) == 10  # sets of 4 MB, for 40 MB
    assert calls["kernel"] == 3 + 7 * 5  # rounds of a millisecond
    assert calls["plain"] == 3 + 7 * 3


def test_noise_does_not_choose_a_kernel() -> None:
    """Two equal sides with the noise of a busy machine: plain MLX, nearly always."""
    random = np.random.default_rng(0)
    chosen = [
        trial.is_faster(*random.lognormal(0, 0.1, (2, 7)).tolist()) for _ in range(1000)
    ]
    assert sum(chosen) <= 20
    faster = random.lognormal(0, 0.1, (1000, 2, 7)) * [[[0.5], [1.0]]]
    assert sum(trial.is_faster(*pair.tolist()) for pair in faster) >= 990
