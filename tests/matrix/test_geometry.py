"""Compares row geometry with dense float64 results."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.kernels import QuantizedWeight
from mlx_dora.matrix import (
    Adapted,
    LowRank,
    RowGeometry,
    Weight,
    pair_geometry,
    row_geometry,
)
from tests.checks import to_numpy


def geometry_of(
    weight: Weight,
    a: np.ndarray,
    b: np.ndarray,
    scale: float,
    m: mx.array | None = None,
) -> RowGeometry:
    update = LowRank(lora_a=mx.array(a), lora_b=mx.array(b), scale=scale)
    return row_geometry(weight, Adapted(update=update, m=m))


def truth(base: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Δm and angle in extended precision; arcsin of half the chord of unit rows."""
    base, after = base.astype(np.longdouble), after.astype(np.longdouble)
    lengths = [np.sqrt((v * v).sum(1)) for v in (base, after)]
    units = [
        v / np.where(n > 0, n, 1)[:, None]
        for v, n in zip((base, after), lengths, strict=True)
    ]
    chord, sum_ = (np.sqrt(((units[1] + s * units[0]) ** 2).sum(1)) for s in (-1, 1))
    angle = 2 * np.arctan2(chord, sum_)
    angle[(lengths[0] == 0) | (lengths[1] == 0)] = 0
    return (lengths[1] - lengths[0]).astype(float), angle.astype(float)


def assert_rows(actual: np.ndarray, expected: np.ndarray, bound: float = 1e-5) -> None:
    np.testing.assert_allclose(to_numpy(actual), expected, rtol=bound, atol=1e-12)


def make(size: float, out: int = 48, width: int = 96, r: int = 4):
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((out, width)).astype(np.float32)
    weight[3] = 0
    a = rng.standard_normal((width, r)).astype(np.float32)
    b = (size * rng.standard_normal((r, out))).astype(np.float32)
    b[:, 7] = 0
    return weight, a, b


@pytest.mark.parametrize("bits", [None, 3, 4, 8])
@pytest.mark.parametrize("size", [1e-5, 1e-2, 1.0])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_each_row_matches_float64(kind, size, bits):
    weight, a, b = make(size)
    dense, stored = weight, mx.array(weight)
    if bits:
        packed, scales, biases = mx.quantize(stored, 32, bits)
        stored = QuantizedWeight(
            weight=packed, scales=scales, biases=biases, group_size=32, bits=bits
        )
        dense = np.array(stored.dequantize())
    after = dense.astype(np.float64) + 0.7 * (a.astype(np.float64) @ b).T
    m = None
    if kind == "dora":
        norm = np.linalg.norm(after, axis=1)
        chosen = (norm * (1 + size)).astype(np.float32)
        chosen[11] *= -1
        unit = np.where(norm > 0, chosen / np.where(norm > 0, norm, 1), 0)
        after, m = after * unit[:, None], mx.array(chosen)
    delta_m, angle = truth(dense, after)
    geometry = geometry_of(stored, a, b, 0.7, m)
    assert_rows(geometry.angle, angle)
    # The float32 sum of squares is accurate to 1e-8 of the length for any change.
    length = np.linalg.norm(dense, axis=1)
    tolerance = 1e-5 * np.abs(delta_m) + 2e-8 * length * (kind == "dora")
    # W0·A is float32: a near-zero ⟨W0, BA⟩ is known to that share of its terms.
    tolerance += 1e-6 * np.abs(after - dense).max(1) * (kind == "lora")
    assert (np.abs(geometry.delta_m - delta_m) <= tolerance + 1e-12).all()


@pytest.mark.parametrize("angle", [1e-4, 1e-6])
def test_tiny_angles_keep_five_digits(angle):
    weight, a, _ = make(1.0, r=1)
    weight[3] = 1
    across = a[:, 0] - (weight @ a[:, 0] / (weight**2).sum(1))[:, None] * weight
    # The factors turn row 0 by the same tiny angle.
    a = across[:1].T.astype(np.float32)
    b = np.zeros((1, 48), np.float32)
    b[0, 0] = angle * np.linalg.norm(weight[0]) / np.linalg.norm(a)
    after = weight.astype(np.float64) + (a.astype(np.float64) @ b).T
    expected = truth(weight, after)[1]
    geometry = geometry_of(mx.array(weight), a, b, 1.0)
    assert expected[0] == pytest.approx(angle, rel=1e-3)
    assert_rows(geometry.angle, expected)
    assert 1 - np.cos(np.float32(angle)) == 0 or angle > 1e-5


def test_an_update_along_the_row_turns_nothing():
    weight, _, _ = make(1.0)
    a = weight[:1].T.copy()
    b = np.zeros((1, 48), np.float32)
    b[0, 0] = 0.25
    geometry = geometry_of(mx.array(weight), a, b, 1.0)
    assert geometry.angle[0] < 1e-12
    assert geometry.recomputed == 1
    assert geometry.delta_m[0] == pytest.approx(
        0.25 * np.linalg.norm(weight[0]), rel=1e-6
    )


def test_a_row_that_cancels_wholly_is_zero():
    weight, _, _ = make(1.0)
    a = weight[:1].T.copy()
    b = np.zeros((1, 48), np.float32)
    b[0, 0] = -1
    geometry = geometry_of(mx.array(weight), a, b, 1.0)
    assert geometry.angle[0] == 0
    assert geometry.delta_m[0] == -geometry.base_norm[0]


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_two_weights_match_float64(dtype, size):
    rng = np.random.default_rng(2)
    base = mx.array(rng.standard_normal((3000, 40)).astype(np.float32)).astype(dtype)
    change = size * rng.standard_normal((3000, 40)).astype(np.float32)
    after = (base + mx.array(change).astype(dtype)).astype(dtype)
    after[5], base[6] = 0.0, 0.0
    delta_m, angle = truth(to_numpy(base), to_numpy(after))
    geometry = pair_geometry(base, after)
    assert_rows(geometry.angle, angle, 1e-7)
    np.testing.assert_allclose(geometry.delta_m, delta_m, rtol=1e-7, atol=1e-13)


def test_weights_of_different_shapes_are_refused():
    with pytest.raises(DoRAError, match="must be the same"):
        pair_geometry(mx.zeros((2, 3)), mx.zeros((3, 2)))
