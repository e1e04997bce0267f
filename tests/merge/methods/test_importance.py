"""SCE, NearSwap and Arcee Fusion, against their definitions in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods import METHODS, blockwise
from tests.checks import assert_close, to_numpy
from tests.merge.methods.test_elementwise import arrays, make, methods
from tests.merge.oracle import total


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 400)  # 8 rows of 50; 1500 elements


def sce_truth(base, tuned, share, equal_below=0.0):
    deltas = [(array - base).astype(float) for array in tuned]
    if share < 1:
        variance = np.var(deltas, axis=0)
        kept = int(np.count_nonzero(variance) * share)
        mask = np.zeros(base.size)
        mask[np.argsort(-variance.ravel(), kind="stable")[:kept]] = 1
        deltas = [delta * mask.reshape(base.shape) for delta in deltas]
    energy = np.array([np.square(delta).mean() for delta in deltas])
    is_equal = energy.sum() <= equal_below
    weights = np.full(len(tuned), 1 / len(tuned)) if is_equal else energy / energy.sum()
    sign = np.where(total(deltas) >= 0, 1, -1)
    shares = [w * (np.sign(d) == sign) for w, d in zip(weights, deltas, strict=True)]
    moved = total(a * d for a, d in zip(shares, deltas, strict=True))
    return base + moved / np.maximum(total(shares), 1e-6)


@pytest.mark.parametrize("share", [1.0, 0.37, 0.001, 0.0])
def test_sce(share: float) -> None:
    base, tuned = make()
    tuned[1] = base + 3 * (tuned[1] - base)  # of more energy
    result = methods.sce(mx.array(base), arrays(*tuned), [1] * 3, select_topk=share)
    assert_close(result, sce_truth(base, tuned, share))


def test_sce_of_small_changes_weighs_by_energy_or_as_mergekit_equally() -> None:
    """mergekit takes equal weights where all mean squares sum to less than 1e-6."""
    rng = np.random.default_rng(1)
    base = np.zeros((30, 50), np.float32)
    sizes = (1e-4, 3e-4)
    tuned = [(a * rng.standard_normal(base.shape)).astype(np.float32) for a in sizes]
    ours, theirs = (
        methods.sce(mx.array(base), arrays(*tuned), [1, 1], as_mergekit=flag)
        for flag in (False, True)
    )
    assert_close(ours, sce_truth(base, tuned, 1.0))
    assert_close(theirs, sce_truth(base, tuned, 1.0, equal_below=1e-6))
    assert np.abs(to_numpy(ours) - to_numpy(theirs)).max() > 1e-5


def test_sce_of_copies_is_the_copy() -> None:
    base, (first, _) = make(2)
    result = methods.sce(mx.array(base), arrays(first, first), [1, 1])
    assert_close(result, first.astype(float), bound=1e-6)


def test_nearswap_cuts_changes_to_t() -> None:
    base, tuned = make(1)
    result = methods.nearswap(mx.array(base), arrays(*tuned), [1], t=0.05)
    delta = tuned[0].astype(float) - base
    assert_close(result, base + np.clip(delta, -0.05, 0.05), bound=1e-6)
    whole = methods.nearswap(mx.array(base), arrays(*tuned), [1], t=9)
    assert (to_numpy(whole) == tuned[0]).all()
    none = methods.nearswap(mx.array(base), arrays(*tuned), [1], t=0)
    assert (to_numpy(none) == base).all()


@pytest.mark.parametrize(("value", "message"), [(None, "needs a value"), (-1, "0 or")])
def test_nearswap_needs_a_t_of_at_least_0(value: float | None, message: str) -> None:
    with pytest.raises(DoRAError, match=f"t.*{message}|{message}.*t"):
        METHODS["nearswap"].own_values(1, lambda _key, _i: value)


def arcee_truth(base, tuned):
    base, tuned = base.astype(float), tuned.astype(float)

    def softmax(rows):
        powers = np.exp(rows - rows.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True) + 1e-8

    p, q = softmax(tuned), softmax(base)
    score = np.abs(tuned - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(score.ravel())
    low, middle, high = (ordered[int(a * (score.size - 1))] for a in (0.25, 0.5, 0.75))
    return np.where(score >= middle + 1.5 * (high - low), tuned, base), score


@pytest.mark.parametrize("shape", [(30, 50), (1500,), (3, 10, 50)])
def test_arcee_fusion(shape: tuple[int, ...]) -> None:
    base, (tuned,) = make(1, shape)
    result = to_numpy(methods.arcee_fusion(mx.array(base), arrays(tuned), [1]))
    truth, _ = arcee_truth(base, tuned)
    assert (result == truth.astype(np.float32)).all()
    assert 0.01 < (result != base).mean() < 0.3


def test_arcee_fusion_of_equal_models_is_the_model() -> None:
    base, _ = make(1)
    result = methods.arcee_fusion(mx.array(base), arrays(base), [1])
    assert (to_numpy(result) == base).all()
