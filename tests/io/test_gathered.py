"""Rows gathered from a tensor in memory or in a file."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.io.checkpoint import Checkpoint, ShardWriter
from mlx_dora.io.gathered import GatheredTensor
from tests.checks import to_numpy

ROWS = np.array([3, 4, 5, -1, -2, 0, 1, -1, 5, 4])


@pytest.mark.parametrize("shape", [(6, 7), (6,), (6, 2, 3)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("is_stored", [False, True])
def test_slices_of_the_gathered_rows(
    tmp_path: Path, shape: tuple[int, ...], dtype: mx.Dtype, is_stored: bool
) -> None:
    """Every slice, flat or by rows, is that of the array that NumPy gathers."""
    source = mx.random.normal(shape).astype(dtype)
    extra = np.random.default_rng(0).standard_normal((2, *shape[1:])).astype(np.float32)
    whole = np.concatenate([to_numpy(source).astype(np.float32), extra[::-1]])
    expected = whole[ROWS]
    tensor = source
    if is_stored:
        with ShardWriter(tmp_path) as writer:
            writer.add("a", source)
        tensor = Checkpoint(tmp_path).stored("a")
    width = int(np.prod(shape[1:], dtype=int))
    gathered = GatheredTensor(tensor, ROWS, extra.reshape(2, width))
    assert (gathered.shape, gathered.size, gathered.ndim) == (
        expected.shape, expected.size, expected.ndim,
    )  # fmt: skip
    flat, matrix = gathered.reshape(-1), gathered.reshape((-1, width))
    for first in range(0, expected.size, 5):
        part = slice(first, first + 5)
        assert (np.array(flat[part]) == expected.ravel()[part]).all()
    for first in range(len(ROWS)):
        part = slice(first, first + 3)
        rows = expected.reshape(-1, width)[part]
        assert (np.array(matrix[part]) == rows).all()
    assert flat[0:0].size == 0
