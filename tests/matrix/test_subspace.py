"""The best low-rank part by blocks of rows, against float64 singular values."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.matrix.subspace import principal_part, residual_energy
from mlx_dora.matrix.weight import row_blocks

TOLERANCE = 1e-3


def matrix(kind: str, shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(0)
    count = min(shape)
    if kind == "a fine-tune":  # directions of falling size that sink into noise
        left = rng.normal(size=(shape[0], 32)) * 0.85 ** np.arange(32)
        right = 0.02 * rng.normal(size=(32, shape[1])) / shape[1] ** 0.5
        return (left @ right + 2e-3 * rng.normal(size=shape)).astype(np.float32)
    left = np.linalg.qr(rng.normal(size=(shape[0], count)))[0]
    right = np.linalg.qr(rng.normal(size=(shape[1], count)))[0]
    index = np.arange(count)
    values = {
        "flat": np.ones(count),
        "random": np.linalg.svd(rng.normal(size=shape), compute_uv=False),
        "slow": 1 / (1 + index),
        "fast": 0.7**index,
        "low rank": np.where(index < 6, 1.0, 0.0),
        "a tail of noise": np.where(index < 6, 10.0 - index, 0.1),
        "wide range": 10.0 ** (-8 * index / count),
        "zero": np.zeros(count),
    }[kind]
    return ((left * values) @ right.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(120, 80), (80, 120), (7, 90)])
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize(
    "kind",
    ["flat", "random", "slow", "fast", "low rank", "a tail of noise", "wide range"],
)
def test_error_is_within_the_tolerance_of_the_least(
    kind: str, rank: int, shape: tuple[int, int]
) -> None:
    whole = matrix(kind, shape)
    weight = mx.array(whole)
    part = principal_part(
        lambda: row_blocks(weight, 640), shape, rank, key=mx.random.key(1)
    )
    values = np.linalg.svd(whole.astype(np.float64), compute_uv=False)
    least = np.square(values[rank:]).sum()
    kept = (part.outputs * part.values) @ part.inputs.T
    error = np.square(whole - kept).sum()
    # Products in float32 are good to 3e-6 of the matrix; its square is 1e-11.
    assert error <= (1 + TOLERANCE) * least + 1e-11 * np.square(values).sum()
    assert part.energy == pytest.approx(np.square(values).sum(), rel=1e-5)
    a, b = part.factors(rank)
    assert a.shape == (shape[1], rank) and b.shape == (rank, shape[0])
    measured = residual_energy(lambda: row_blocks(weight, 640), a, b)
    assert measured == pytest.approx(error, rel=1e-3, abs=1e-11 * part.energy)


@pytest.mark.parametrize(
    ("kind", "rank"), [("a fine-tune", 16), ("random", 1), ("random", 4)]
)
@pytest.mark.parametrize("key", [0, 1, 2])
def test_slow_convergence_does_not_end_the_search_early(
    kind: str, rank: int, key: int
) -> None:
    whole = matrix(kind, (400, 300))
    part = principal_part(
        lambda: row_blocks(mx.array(whole)), (400, 300), rank, key=mx.random.key(key)
    )
    values = np.linalg.svd(whole.astype(np.float64), compute_uv=False)
    kept = (part.outputs * part.values) @ part.inputs.T
    error = np.square(whole - kept).sum()
    assert error <= (1 + TOLERANCE) * np.square(values[rank:]).sum()
    assert part.excess < TOLERANCE


def test_search_starts_from_the_part_of_a_similar_matrix() -> None:
    whole = matrix("a fine-tune", (400, 300)).astype(np.float32)
    gain = 1 + 1e-3 * np.random.default_rng(1).normal(size=(400, 1))
    similar = (gain * whole).astype(np.float32)
    read = lambda m: lambda: row_blocks(mx.array(m), 4096)  # noqa: E731
    first = principal_part(read(whole), (400, 300), 8, key=mx.random.key(0))
    cold = principal_part(read(similar), (400, 300), 8, key=mx.random.key(0))
    warm = principal_part(
        read(similar), (400, 300), 8, key=mx.random.key(0), near=first
    )
    assert warm.passes == 2 < cold.passes
    values = np.linalg.svd(similar.astype(np.float64), compute_uv=False)
    kept = (warm.outputs * warm.values) @ warm.inputs.T
    error = np.square(similar - kept).sum()
    assert error <= (1 + TOLERANCE) * np.square(values[8:]).sum()


def test_zero_matrix_has_no_part() -> None:
    weight = mx.zeros((12, 9))
    part = principal_part(lambda: row_blocks(weight), (12, 9), 3)
    assert not part.values.any()
    assert not mx.any(part.factors(3)[1] != 0)


def test_very_large_and_small_values_are_exact() -> None:
    for size in (1e15, 1e-15):
        whole = matrix("fast", (40, 30)) * np.float32(size)
        weight = mx.array(whole)
        part = principal_part(lambda w=weight: row_blocks(w), (40, 30), 4)
        values = np.linalg.svd(whole.astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(part.values, values[:4], rtol=1e-4)


def test_the_matrix_is_read_in_blocks_once_a_pass() -> None:
    weight = mx.array(matrix("slow", (64, 32)))
    reads, rows = 0, []

    def blocks() -> Iterator[tuple[slice, mx.array]]:
        nonlocal reads
        reads += 1
        for index, block in row_blocks(weight, 256):
            rows.append(block.shape[0])
            yield index, block

    part = principal_part(blocks, (64, 32), 4, tolerance=None, passes=3)
    assert part.passes == reads == 4
    assert max(rows) == 8
