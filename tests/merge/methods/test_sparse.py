"""Methods that drop entries, against their definitions in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods import blockwise
from tests.checks import assert_close, to_numpy
from tests.merge.methods.test_elementwise import arrays, make, methods, taus
from tests.merge.oracle import total

DROPPING = ["ties", "dare", "breadcrumbs", "della", "della_linear"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 400)  # 8 rows of 50; 1500 elements


def middle(delta: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Model Breadcrumbs: zero outside the entries between the two cuts."""
    size = delta.size
    kept, top = int(density * size), int(gamma * size)
    order = np.argsort(np.abs(delta).ravel(), kind="stable")
    low = max(0, size - kept - top)
    masked = np.zeros(size)
    masked[order[low : low + kept]] = delta.ravel()[order[low : low + kept]]
    return masked.reshape(delta.shape)


@pytest.mark.parametrize(
    ("density", "gamma"), [(0.6, 0.1), (0.95, 0.2), (0.3, 0.0), (0.0, 0.1)]
)
def test_breadcrumbs_keeps_the_middle(density: float, gamma: float) -> None:
    """Less than gamma is dropped if too few entries are left otherwise."""
    base, tuned = make()
    w = [0.4, 0.5, 0.8]
    result = methods.breadcrumbs(
        mx.array(base), arrays(*tuned), w, density=density, gamma=gamma
    )
    deltas = [(array - base).astype(float) for array in tuned]
    parts = [middle(delta, density, gamma) for delta in deltas]
    assert_close(result, base + total(a * p for a, p in zip(w, parts, strict=True)))


def test_breadcrumbs_of_each_model_has_its_own_gamma() -> None:
    base, tuned = make()
    result = methods.breadcrumbs(
        mx.array(base), arrays(*tuned), [1.0, 0, 0], density=0.5
    )
    deltas = [(array - base).astype(float) for array in tuned]
    assert_close(result, base + middle(deltas[0], 0.5, 0.01))


def test_breadcrumbs_ties_elects_signs_but_sums() -> None:
    base, tuned = make()
    w = [1.0, 0.5, 2.0]
    result = methods.breadcrumbs_ties(mx.array(base), arrays(*tuned), w, density=0.6)
    deltas = [(array - base).astype(float) for array in tuned]
    moved = [a * middle(d, 0.6, 0.01) for a, d in zip(w, deltas, strict=True)]
    sign = np.where(total(moved) >= 0, 1, -1)
    assert_close(result, base + total(m * (np.sign(m) == sign) for m in moved))


def test_della_keeps_larger_entries_of_a_row_more_often() -> None:
    base = np.zeros((4000, 11), np.float32)
    row = np.arange(1, 12, dtype=np.float32)
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(np.tile(row, (4000, 1)), axis=1)
    result = to_numpy(
        methods.della_linear(
            mx.array(base), arrays(shuffled), [1.0], density=0.5, epsilon=0.3,
            rescale=False,
        )
    )  # fmt: skip
    assert set(np.unique(result - shuffled)) <= {0.0, *(-row).tolist()}
    kept = [(result[shuffled == value] != 0).mean() for value in row]
    expected = 0.2 + 0.6 * np.arange(11) / 10
    assert np.abs(kept - expected).max() < 0.04  # 5 standard errors of 4000 draws


def test_della_divides_by_each_entrys_probability() -> None:
    base, tuned = make(1)
    result = to_numpy(
        methods.della_linear(
            mx.array(base), arrays(*tuned), [1.0], density=0.5, epsilon=0.2
        )
    )
    delta = (tuned[0] - base).astype(float)
    rank = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)
    expected = delta / (0.3 + 0.4 * rank / 49)
    kept = np.abs(result - base) > 1e-7
    assert 0.4 < kept.mean() < 0.6
    assert_close(mx.array(result[kept]), (base + expected)[kept], bound=1e-5)


@pytest.mark.parametrize("epsilon", [0.5, 0.9])
def test_della_refuses_probabilities_beyond_0_and_1(epsilon: float) -> None:
    base, tuned = make(1)
    with pytest.raises(DoRAError, match="epsilon"):
        methods.della(
            mx.array(base), arrays(*tuned), [1.0], density=0.5, epsilon=epsilon
        )


@pytest.mark.parametrize("method", ["dare", "della_linear", "ties", "breadcrumbs"])
def test_mergekits_rescaling_keeps_the_sum_of_absolute_values(method: str) -> None:
    """``rescale`` of mergekit, also over several blocks."""
    base, tuned = make(1)
    call = getattr(methods, method)
    result = call(
        mx.array(base), arrays(*tuned), [1.0], density=0.4, rescale=True,
        as_mergekit=True, normalize=False,
    )  # fmt: skip
    moved = to_numpy(result) - base
    delta = taus(base, tuned)[0]
    kept = np.abs(moved) > 1e-6
    assert 0.3 < kept.mean() < 0.5
    assert np.abs(moved).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-5)
    factors = moved[kept] / delta[kept]
    assert np.ptp(factors) < 1e-2 * factors.mean()  # one factor, up to rounding


@pytest.mark.parametrize("method", DROPPING)
def test_density_1_drops_nothing_and_density_0_everything(method: str) -> None:
    base, tuned = make(1)
    call = getattr(methods, method)
    full = call(mx.array(base), arrays(*tuned), [1.0], density=1.0)
    assert_close(full, tuned[0].astype(float), bound=1e-6)
    none = call(mx.array(base), arrays(*tuned), [1.0], density=0.0)
    assert (to_numpy(none) == base).all()


@pytest.mark.parametrize("method", ["della", "della_linear", "dare"])
def test_the_same_seed_drops_the_same_entries(method: str) -> None:
    base, tuned = make(2)
    call = getattr(methods, method)
    first, again, other = (
        to_numpy(call(mx.array(base), arrays(*tuned), [1.0, 1.0], density=0.5, seed=s))
        for s in (3, 3, 4)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_vectors_and_single_columns_have_one_row_and_rows_of_one() -> None:
    base = np.zeros(9, np.float32)
    tuned = np.arange(1.0, 10.0, dtype=np.float32)
    for shape in ((9,), (9, 1)):
        result = methods.della_linear(
            mx.array(base.reshape(shape)), arrays(tuned.reshape(shape)), [1.0],
            density=0.5, rescale=False,
        )  # fmt: skip
        kept = to_numpy(result).ravel()
        assert set(kept - tuned) <= {0.0, *(-tuned).tolist()}
        assert np.isfinite(kept).all()
