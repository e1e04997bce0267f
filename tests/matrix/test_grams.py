"""Compares inner products of adapted rows with dense rows in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.matrix import LowRank, QuantizedWeight, row_grams


def updates(out: int, width: int) -> list[LowRank]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape).astype(np.float32))

    return [
        LowRank(lora_a=normal(width, r), lora_b=0.1 * normal(r, out), scale=s)
        for r, s in ((4, 0.5), (1, 2.0), (3, -1.0))
    ]


@pytest.mark.parametrize("bits", [None, 4])
def test_every_pair_of_rows_is_that_of_the_dense_weights(bits: int | None) -> None:
    weight = mx.random.normal((40, 64), key=mx.random.key(0))
    stored, dense = weight, weight
    if bits:
        packed, scales, biases = mx.quantize(weight, 32, bits)
        stored = QuantizedWeight(
            weight=packed, scales=scales, biases=biases, group_size=32, bits=bits
        )
        dense = stored.dequantize()
    grams = row_grams(stored, updates(40, 64))
    base = np.array(dense, np.float64)
    full = np.stack(
        [base + np.array(u.rows(slice(None)), np.float64) for u in updates(40, 64)], 1
    )
    exact = full @ full.transpose(0, 2, 1)
    np.testing.assert_allclose(grams.inner, exact, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(grams.norm, np.linalg.norm(full, axis=2), rtol=1e-6)
    np.testing.assert_allclose(grams.base_norm, np.linalg.norm(base, axis=1), rtol=5e-8)
    assert grams.recomputed == 0


def test_a_row_that_nearly_cancels_is_taken_densely() -> None:
    weight = mx.random.normal((6, 16), key=mx.random.key(0))
    lora_b = mx.zeros((1, 6))
    lora_b[0, 2] = -0.999
    update = LowRank(lora_a=weight[2][:, None], lora_b=lora_b, scale=1.0)
    grams = row_grams(weight, [update, update])
    length = np.linalg.norm(np.array(weight[2], np.float64))
    assert grams.recomputed == 1
    assert grams.norm[2, 0] == pytest.approx(1e-3 * length, rel=1e-4)
