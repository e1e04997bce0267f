"""Row norms and decomposition of every size that float32 holds, against float64."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import dora_decompose, dora_merge
from mlx_dora.kernels import adapted_norm, fused_weight, normalize_rows
from mlx_dora.matrix import Adapted, LowRank, exact_terms, row_geometry, row_grams
from mlx_dora.merge.adapters.factor import row_norm
from tests.checks import BOUNDS, to_numpy

# With 65 columns the largest norm is 9 times this.
SIZES = [1e-38, 1e-30, 1e-25, 1e-20, 1e-15, 1.0, 1e15, 1e18, 1e20, 1e30, 3e37]
DTYPES = [mx.float32, mx.bfloat16]


def matrix(size: float, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    """33 rows of 65 columns of one size; row 4 is zero."""
    values = np.random.default_rng(seed).uniform(-1, 1, (33, 65)) * size
    values[4] = 0
    return mx.array(values.astype(np.float32)).astype(dtype)


def close(found: mx.array, exact: np.ndarray, bound: float = 2e-6) -> None:
    """Every entry within `bound` of the exact one, or one step of a subnormal."""
    np.testing.assert_allclose(to_numpy(found), exact, rtol=bound, atol=1.5e-45)


def unit_rows(values: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(values, axis=1)[:, None]
    return np.divide(values, norm, out=np.zeros_like(values), where=norm > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_lengths_and_directions_are_those_of_float64(
    size: float, dtype: mx.Dtype
) -> None:
    weight = matrix(size, dtype)
    exact = to_numpy(weight)
    norm = np.linalg.norm(exact, axis=1)
    m, direction = dora_decompose(weight)
    close(m, norm)
    assert m[4].item() == 0
    assert (direction[4] == 0).all()
    np.testing.assert_allclose(
        to_numpy(direction), unit_rows(exact), rtol=0, atol=BOUNDS[dtype]
    )
    close(row_norm(weight), norm)
    rescaled, _ = normalize_rows(weight, m)
    assert np.abs(to_numpy(rescaled) - exact).max() <= BOUNDS[dtype] * norm.max()


def test_subnormal_rows_have_a_direction() -> None:
    weight = matrix(1e-42, mx.float32)
    m, direction = dora_decompose(weight)
    norm = np.linalg.norm(to_numpy(weight), axis=1)
    close(m, norm)
    assert np.abs(to_numpy(direction) - unit_rows(to_numpy(weight))).max() < 1e-6


def test_rows_of_unlike_sizes_do_not_spoil_each_other() -> None:
    weight = matrix(1.0, mx.float32)
    factors = mx.array(np.logspace(-37, 37, 33).astype(np.float32))
    mixed = factors[:, None] * weight
    close(dora_decompose(mixed)[0], np.linalg.norm(to_numpy(mixed), axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_merging_changes_is_that_of_float64(size: float, dtype: mx.Dtype) -> None:
    weight, change = matrix(size, dtype), matrix(size / 8, mx.float32, seed=1)
    delta_m = row_norm(weight) / 16
    merged = dora_merge(weight, delta_m, change)
    assert merged.dtype == dtype
    base = to_numpy(weight)
    m = np.linalg.norm(base, axis=1) + to_numpy(delta_m)
    exact = m[:, None] * unit_rows(base + to_numpy(change))
    assert np.abs(to_numpy(merged) - exact).max() <= BOUNDS[dtype] * m.max()


@pytest.mark.parametrize(
    ("size", "down"),
    [
        (size, down)
        for size in SIZES
        for down in (1e-30, 1.0, 1e30)
        if 1e-36 < size / down < 1e37  # else B is beyond float32
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_adapted_rows_are_those_of_float64(
    size: float, dtype: mx.Dtype, down: float
) -> None:
    weight = matrix(size, dtype)
    rng = np.random.default_rng(2)
    up = 0.1 * size / down
    a = mx.array((rng.uniform(-1, 1, (65, 3)) * down).astype(np.float32))
    b = mx.array((rng.uniform(-1, 1, (3, 33)) * up).astype(np.float32))
    adapted = to_numpy(weight) + 2 * (to_numpy(a) @ to_numpy(b)).T
    exact = np.linalg.norm(adapted, axis=1)
    bound = 1e-4
    close(adapted_norm(weight, a, b, 2.0), exact, bound)
    update = LowRank(lora_a=a, lora_b=b, scale=2.0)
    close(exact_terms(weight, update).norm, exact, bound)
    inner = row_grams(weight, [update]).inner[:, 0, 0]
    np.testing.assert_allclose(np.sqrt(inner), exact, rtol=bound)
    close(adapted_norm(weight[None], a[None], b[None], 2.0)[0], exact, bound)
    geometry = row_geometry(weight, Adapted(update=update, m=None))
    assert geometry.is_finite
    base = np.linalg.norm(to_numpy(weight), axis=1)
    np.testing.assert_allclose(geometry.base_norm, base, rtol=1e-5)
    error = np.abs(geometry.delta_m - (exact - base))
    assert error.max() <= 1e-6 * exact.max()
    chord = np.linalg.norm(unit_rows(adapted) - unit_rows(to_numpy(weight)), axis=1)
    angle = np.where(base > 0, 2 * np.arcsin(np.minimum(chord / 2, 1)), 0)
    np.testing.assert_allclose(geometry.angle, angle, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_a_fused_row_has_the_length_m(size: float) -> None:
    weight = matrix(size, mx.float32)
    a = mx.ones((65, 2))
    b = mx.full((2, 33), 0.01 * size)
    m = mx.full((33,), 3.0)
    fused = fused_weight(weight, a, b, 1.0, m)
    close(row_norm(fused), np.full(33, 3.0))


@pytest.mark.parametrize(
    "function", [lambda w: normalize_rows(w)[0], lambda w: dora_decompose(w)[1]]
)
def test_traced_functions_keep_the_whole_range(
    function: Callable[[mx.array], mx.array],
) -> None:
    for size in (1e-30, 1.0, 1e30):
        weight = matrix(size, mx.float32)
        assert (
            np.abs(
                to_numpy(mx.compile(function)(weight)) - to_numpy(function(weight))
            ).max()
            < 1e-6
        )


def test_ordinary_rows_keep_their_bits() -> None:
    weight = matrix(0.02, mx.float32)[:4]
    m, direction = dora_decompose(weight)
    plain = mx.sqrt(mx.square(weight).sum(axis=1))
    assert mx.array_equal(m, plain)
    assert mx.array_equal(direction, (1 / plain)[:, None] * weight)
