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
