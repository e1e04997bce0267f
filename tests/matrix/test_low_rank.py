"""Compares spectrum, cut and inner products of a low-rank update with dense results."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.matrix import Factors, LowRank
from mlx_dora.matrix.low_rank import side_by_side
from tests.checks import assert_close


def factors(out: int = 30, width: int = 20, r: int = 5, seed: int = 0) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(a=rng.standard_normal((width, r)), b=rng.standard_normal((out, r)))


def dense(update: Factors) -> np.ndarray:
    return update.b @ update.a.T


def test_float64_factors_hold_the_scale() -> None:
    a, b = mx.arange(6.0).reshape(3, 2), mx.arange(8.0).reshape(2, 4)
    update = LowRank(lora_a=a, lora_b=b, scale=0.5)
    assert_close(update.rows(slice(None)), 0.5 * (np.array(a) @ np.array(b)).T)
    assert_close(update.rows(slice(None)), dense(update.float64()))


@pytest.mark.parametrize(("out", "width"), [(30, 20), (20, 30), (3, 20), (30, 3)])
def test_spectrum_is_that_of_the_dense_update(out: int, width: int) -> None:
    update = factors(out, width)
    spectrum = update.spectrum()
    exact = np.linalg.svd(dense(update), compute_uv=False)[: spectrum.values.size]
    np.testing.assert_allclose(spectrum.values, exact, rtol=1e-12)
    rebuilt = spectrum.outputs * spectrum.values @ spectrum.inputs.T
    np.testing.assert_allclose(rebuilt, dense(update), atol=1e-12)
    np.testing.assert_allclose(update.singular_values()[: exact.size], exact, rtol=1e-7)


def test_a_cut_is_the_best_of_its_rank_for_the_row_weights() -> None:
    update = factors()
    weight = 0.5 + np.random.default_rng(1).random(30)
    cut, lost = update.cut(2, weight)
    left = weight[:, None] * (dense(update) - dense(cut))
    exact = np.linalg.svd(weight[:, None] * dense(update), compute_uv=False)
    assert cut.a.shape == (20, 2)
    assert np.linalg.norm(left) == pytest.approx(np.linalg.norm(exact[2:]))
    assert lost == pytest.approx((exact[2:] ** 2).sum() / (exact**2).sum())


def test_a_cut_above_the_rank_of_the_matrix_loses_nothing() -> None:
    update = factors(out=3, width=4, r=7)
    cut, lost = update.cut(6, np.ones(3))
    np.testing.assert_allclose(dense(cut), dense(update), atol=1e-12)
    assert lost == 0


def test_row_inner_products_are_those_of_dense_rows() -> None:
    first, other = factors(), factors(r=2, seed=1)
    exact = (dense(first) * dense(other)).sum(1)
    np.testing.assert_allclose(first.inner(other), exact, atol=1e-12)


@pytest.mark.parametrize("r", [3, 12])  # below and above the width
@pytest.mark.parametrize("stack", [(), (2,)])
def test_squared_rows_are_those_of_dense_rows(r: int, stack: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((*stack, 7, r)), rng.standard_normal((*stack, r, 5))
    update = LowRank(lora_a=mx.array(a), lora_b=mx.array(b), scale=3.0)
    assert_close(update.squared_rows(), np.square(a @ b).sum(-2))


def test_updates_side_by_side_sum_and_share_an_equal_a() -> None:
    first, other = factors(), factors(r=2, seed=1)
    third = Factors(a=first.a, b=factors(seed=2).b)
    total = side_by_side([first, other, third])
    assert total.a.shape[1] == 7
    exact = dense(first) + dense(other) + dense(third)
    np.testing.assert_allclose(dense(total), exact, atol=1e-12)
