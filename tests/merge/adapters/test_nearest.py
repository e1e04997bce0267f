"""Extraction of large matrices from blocks of rows, against the dense decomposition."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.kernels import QuantizedWeight
from mlx_dora.matrix.subspace import principal_part
from mlx_dora.merge.adapters import nearest as module
from mlx_dora.merge.adapters.factor import factor, row_norm
from mlx_dora.merge.adapters.nearest import nearest
from tests.checks import assert_close, to_numpy

OUT, WIDTH, RANK = 96, 128, 8


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Treat small matrices as large, in blocks of a few rows."""
    monkeypatch.setattr(module, "LARGE", 8)
    monkeypatch.setattr(module, "_ELEMENTS", 7 * WIDTH)
    yield


def make(kind: str, shape: tuple[int, int] = (OUT, WIDTH)) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(3)
    base = 0.02 * rng.standard_normal(shape)
    if kind == "noise":
        change = 1e-3 * rng.standard_normal(shape)
    else:
        left = rng.standard_normal((shape[0], 20)) * 0.8 ** np.arange(20)
        change = 1e-2 * left @ rng.standard_normal((20, shape[1])) / shape[1] ** 0.5
    return mx.array(base.astype(np.float32)), mx.array(
        (base + change).astype(np.float32)
    )


def dense_error(base: mx.array, tuned: mx.array, rank: int) -> float:
    made = factor(base, tuned, row_norm(tuned), scale=1.0, rank=rank)
    rows = to_numpy(base) + (to_numpy(made.lora_a) @ to_numpy(made.lora_b)).T
    rows *= to_numpy(made.m)[:, None] / np.linalg.norm(rows, axis=1, keepdims=True)
    goal = to_numpy(tuned)
    return float(np.linalg.norm(rows - goal) / np.linalg.norm(goal - to_numpy(base)))


@pytest.mark.parametrize("kind", ["noise", "falling"])
@pytest.mark.parametrize("shape", [(OUT, WIDTH), (WIDTH, OUT)])
def test_the_error_is_that_of_the_dense_decomposition(
    kind: str, shape: tuple[int, int]
) -> None:
    """The squared error exceeds the least by about 0.1 % at most."""
    base, tuned = make(kind, shape)
    found = nearest(base, tuned, rank=RANK, energy=None)
    assert found is not None
    merged, error = found
    best = dense_error(base, tuned, RANK)
    assert best * 0.999 < error < best * 1.002
    rows = to_numpy(base) + (to_numpy(merged.lora_a) @ to_numpy(merged.lora_b)).T
    rows *= to_numpy(merged.m)[:, None] / np.linalg.norm(rows, axis=1, keepdims=True)
    goal = to_numpy(tuned)
    actual = np.linalg.norm(rows - goal) / np.linalg.norm(goal - to_numpy(base))
    assert error == pytest.approx(actual, rel=1e-4)
    assert_close(merged.m, np.linalg.norm(goal, axis=1), bound=1e-6)
    assert merged.lora_a.shape == (shape[1], RANK)
    assert merged.discarded == pytest.approx(actual**2, rel=0.1)


@pytest.mark.parametrize("size", [1e-2, 1e-5])
@pytest.mark.parametrize("shrunk", [False, True])
def test_the_error_keeps_its_digits_for_small_changes(
    size: float, shrunk: bool
) -> None:
    """Against float64; a row that nearly vanishes gets the least weight."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal((OUT, WIDTH)).astype(np.float32)
    left = rng.standard_normal((OUT, RANK + 2)) * 0.1 ** np.arange(RANK + 2)
    goal = base + size * left @ rng.standard_normal((RANK + 2, WIDTH))
    if shrunk:
        goal[5] = 1e-8 * rng.standard_normal(WIDTH)
    goal = goal.astype(np.float32)
    found = nearest(mx.array(base), mx.array(goal), rank=RANK, energy=None)
    assert found is not None
    merged, error = found
    rows = base + (to_numpy(merged.lora_a) @ to_numpy(merged.lora_b)).T
    rows *= to_numpy(merged.m)[:, None] / np.linalg.norm(rows, axis=1, keepdims=True)
    exact, moved = goal.astype(np.float64), goal.astype(np.float64) - base
    actual = np.linalg.norm(rows - exact) / np.linalg.norm(moved)
    # float32 rows and magnitudes of 1 cannot be nearer than 1e-7.
    floor = float(1e-7 * np.linalg.norm(exact) / np.linalg.norm(moved))
    assert error == pytest.approx(actual, rel=1e-3, abs=floor)


@pytest.mark.parametrize("energy", [0.3, 0.5])
def test_an_energy_chooses_the_least_rank(energy: float) -> None:
    base, tuned = make("falling")
    found = nearest(base, tuned, rank=None, energy=energy)
    assert found is not None
    merged, _ = found
    made = factor(base, tuned, row_norm(tuned), scale=1.0, energy=energy)
    assert merged.discarded <= 1 - energy + 1e-3
    assert abs(merged.rank - made.rank) <= 1
    capped = nearest(base, tuned, rank=1, energy=0.9)
    assert capped is not None
    assert capped[0].rank == 1


def test_it_declines_what_a_dense_decomposition_does_better() -> None:
    base, tuned = make("noise")
    for rank, energy in ((OUT, None), (13, None), (None, 0.99)):
        assert nearest(base, tuned, rank=rank, energy=energy) is None
    assert nearest(base, base, rank=RANK, energy=None) is None  # unchanged
    for factor_ in (1e-25, 1e20):  # squares beyond float32
        assert nearest(base * factor_, tuned * factor_, rank=4, energy=None) is None
    bad = mx.where(mx.arange(WIDTH) == 5, float("nan"), tuned)
    assert nearest(base, bad, rank=4, energy=None) is None


def test_an_energy_out_of_reach_is_declined_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The eight directions of a try show that the 24 allowed cannot be enough."""
    base, tuned = make("noise", (192, 256))
    counts = []

    def counted(*args, **kw):
        counts.append(args[2])
        return principal_part(*args, **kw)

    monkeypatch.setattr(module, "principal_part", counted)
    assert nearest(base, tuned, rank=None, energy=0.9) is None
    assert counts == [8]


def test_zero_rows_have_no_direction() -> None:
    base, tuned = make("falling")
    keep = (mx.arange(OUT) != 3)[:, None]
    found = nearest(base, mx.where(keep, tuned, 0.0), rank=RANK, energy=None)
    assert found is not None
    assert found[0].zero == 1
    assert to_numpy(found[0].m)[3] == 0
    other = nearest(mx.where(keep, base, 0.0), tuned, rank=RANK, energy=None)
    assert other is not None
    assert np.isfinite(to_numpy(other[0].lora_b)).all()
    assert other[1] < 1


def test_a_packed_base_is_read_by_its_rows() -> None:
    base, tuned = make("falling")
    packed, scales, biases = mx.quantize(base, 32, 8)
    weight = QuantizedWeight(
        weight=packed, scales=scales, biases=biases, group_size=32, bits=8
    )
    found = nearest(weight, tuned, rank=RANK, energy=None)
    plain = nearest(weight.dequantize(), tuned, rank=RANK, energy=None)
    assert found is not None
    assert plain is not None
    assert_close(found[0].lora_a, to_numpy(plain[0].lora_a), bound=1e-6)
    assert found[1] == pytest.approx(plain[1], rel=1e-6)
