"""Norms from the columns that each process holds, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.kernels.adapted_norm import norm_by_columns, own_inner
from mlx_dora.matrix.low_rank import LowRank
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.sharded import Part, ShardedWeight, own_rows
from mlx_dora.matrix.weight import row_squares
from tests.adapters.test_sharding import member
from tests.checks import assert_close

OUT, WIDTH, RANK = 48, 256, 8


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("processes", [2, 4])
def test_sums_over_columns_give_the_norm(bits: int | None, processes: int) -> None:
    random = np.random.default_rng(2)
    base = random.normal(size=(OUT, WIDTH)).astype(np.float32)
    a = random.normal(size=(WIDTH, RANK)).astype(np.float32)
    b = random.normal(size=(RANK, OUT)).astype(np.float32)
    update = LowRank(lora_a=mx.array(a), lora_b=mx.array(b), scale=0.7)
    squared, inner = mx.zeros((OUT,)), mx.zeros((OUT,))
    unpacked = []
    for rank in range(processes):
        own = own_rows(WIDTH, member(rank, processes))
        part: Part = mx.array(base[:, own])
        if bits:
            words, scales, biases = mx.quantize(part, 32, bits)
            part = QuantizedWeight(
                weight=words, scales=scales, biases=biases, group_size=32, bits=bits
            )
            unpacked.append(part.dequantize())
        else:
            unpacked.append(part)
        weight = ShardedWeight(part=part, group=member(rank, processes), axis=1)
        assert weight.shape == (OUT, WIDTH)
        assert weight.own == own
        squared = squared + row_squares(part)
        inner = inner + own_inner(weight, update)
    whole = np.concatenate([np.array(part) for part in unpacked], 1).astype(np.float64)
    adapted = whole + 0.7 * (a.astype(np.float64) @ b.astype(np.float64)).T
    norm = norm_by_columns(update, squared, inner)
    assert_close(norm, np.linalg.norm(adapted, axis=1), bound=1e-6)
