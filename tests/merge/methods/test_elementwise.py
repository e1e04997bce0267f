"""Element-wise methods against their definitions in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods import METHODS, blockwise, elementwise
from mlx_dora.merge.methods.settings import TensorSettings
from mlx_dora.merge.models.tensor import merge_tensor
from tests.checks import assert_close, to_numpy
from tests.merge.oracle import total


class Methods:
    """Functions of blocks on arrays, with settings as keywords."""

    def __getattr__(self, name):
        entry = METHODS[name]

        def call(base, tensors, weights, *, density=None, scale=1.0, **settings):
            if isinstance(density, float):
                density = [density] * len(tensors)
            names = [parameter.name for parameter in entry.own]
            given = {key: settings.pop(key) for key in names if key in settings}
            tensor_settings = TensorSettings(
                weights=np.array(weights),
                density=None if density is None else tuple(density),
                scale=scale,
                own=entry.own_values(len(tensors), lambda key, _: given.get(key)),
                **settings,
            )
            blocks = entry.block_function(base, tensors, tensor_settings)
            return blockwise.joined(blocks, tensors[0].shape)

        return call


methods = Methods()


def make(count=3, shape=(30, 50), seed=0):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    tuned = [
        (base + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        for _ in range(count)
    ]
    return base, tuned


def arrays(*values):
    return [mx.array(value) for value in values]


def taus(base, tuned):
    return [array.astype(float) - base for array in tuned]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 400)  # 1500 elements: a last block of 300


def test_linear():
    _, tuned = make()
    w = [1.0, 2.0, 5.0]
    truth = total(a * t.astype(float) for a, t in zip(w, tuned, strict=True))
    assert_close(methods.linear(None, arrays(*tuned), w), truth / 8)
    assert_close(methods.linear(None, arrays(*tuned), w, normalize=False), truth)
    with pytest.raises(DoRAError, match="sum to 0"):
        methods.linear(None, arrays(*tuned), [1, -1, 0])


def test_task_arithmetic():
    base, tuned = make()
    w = [0.4, 0.5, 0.8]
    moved = total(a * t for a, t in zip(w, taus(base, tuned), strict=True))
    result = methods.task_arithmetic(mx.array(base), arrays(*tuned), w, scale=0.5)
    assert_close(result, base + 0.5 * moved)
    result = methods.task_arithmetic(mx.array(base), arrays(*tuned), w, normalize=True)
    assert_close(result, base + moved / sum(w))


def ties_truth(deltas, weights, densities, normalize):
    trimmed = []
    for delta, share in zip(deltas, densities, strict=True):
        kept = max(1, int(share * delta.size))
        least = np.sort(np.abs(delta).ravel())[-kept]
        trimmed.append(np.where(np.abs(delta) >= least, delta, 0))
    moved = [w * d for w, d in zip(weights, trimmed, strict=True)]
    sign = np.where(total(moved) >= 0, 1, -1)
    agrees = [np.sign(change) == sign for change in moved]
    moved_sum = total(change * a for change, a in zip(moved, agrees, strict=True))
    share = total(w * a for w, a in zip(weights, agrees, strict=True))
    return moved_sum / np.where(share == 0, 1, share) if normalize else moved_sum


@pytest.mark.parametrize("normalize", [True, False])
def test_ties(normalize):
    base, tuned = make()
    w, density = [1.0, 0.5, 2.0], [0.2, 0.5, 1.0]
    result = methods.ties(
        mx.array(base), arrays(*tuned), w, density=density, normalize=normalize
    )
    # Subtract in float32, as the code does to find the threshold.
    deltas = [(array - base).astype(float) for array in tuned]
    assert_close(result, base + ties_truth(deltas, w, density, normalize))


def test_ties_keeps_the_first_of_equal_entries() -> None:
    base = np.zeros((30, 50), np.float32)
    rng = np.random.default_rng(3)
    single = rng.choice([-2.0, -1.0, 0.5, 1.0], base.shape).astype(np.float32)
    for density in (0.1, 0.4, 0.6, 0.9):
        kept = int(density * single.size)
        first = np.argsort(-np.abs(single).ravel(), kind="stable")[:kept]
        truth = np.zeros(single.size)
        truth[first] = single.ravel()[first]
        result = methods.ties(mx.array(base), arrays(single), [1.0], density=density)
        assert (to_numpy(result).ravel() == truth).all()


def test_half_precision_is_rounded_once() -> None:
    _, tuned = make()
    halves = [mx.array(array).astype(mx.bfloat16) for array in tuned]
    truth = np.mean([to_numpy(half) for half in halves], axis=0)
    assert_close(methods.linear(None, halves, [1, 1, 1]), truth, bound=1e-6)


def test_ties_at_density_0_returns_the_base():
    base, tuned = make()
    result = methods.ties(mx.array(base), arrays(*tuned), [1, 1, 1], density=0.0)
    assert (to_numpy(result) == base).all()
    with pytest.raises(DoRAError, match="density must be a share"):
        methods.ties(mx.array(base), arrays(*tuned), [1, 1, 1], density=1.5)


def test_dare_keeps_the_given_share_and_rescales_it():
    base, tuned = make(1, (400, 100))
    result = methods.dare(mx.array(base), arrays(*tuned), [1.0], density=0.3, seed=4)
    moved = to_numpy(result) - base
    kept = np.abs(moved) > 1e-7
    assert kept.mean() == pytest.approx(0.3, abs=0.01)
    assert_close(moved[kept], (taus(base, tuned)[0] / 0.3)[kept], bound=1e-5)
    again = methods.dare(mx.array(base), arrays(*tuned), [1.0], density=0.3, seed=4)
    assert (to_numpy(again) == to_numpy(result)).all()
    other = methods.dare(mx.array(base), arrays(*tuned), [1.0], density=0.3, seed=5)
    assert (to_numpy(other) != to_numpy(result)).any()
    last = methods.dare(
        mx.array(base), arrays(*tuned), [1.0], density=0.3, seed=2**64 - 1
    )
    share = (np.abs(to_numpy(last) - base) > 1e-7).mean()
    assert share == pytest.approx(0.3, abs=0.01)


def test_dare_drops_different_entries_in_each_block_and_model():
    base = np.zeros((40, 100), np.float32)
    tuned = np.ones_like(base)
    first, second = (
        to_numpy(methods.dare(mx.array(base), arrays(*pair), w, density=0.5)) > 0
        for pair, w in (([tuned], [1.0]), ([base, tuned], [1.0, 1.0]))
    )
    flat = first.ravel()
    assert (flat[:400] != flat[400:800]).any()
    assert (first != second).any()


def test_dare_ties_without_dropping_is_ties_without_trimming():
    base, tuned = make()
    w = [1.0, 0.5, 2.0]
    given = mx.array(base), arrays(*tuned), w
    result = methods.dare_ties(*given, density=1.0)
    assert_close(result, to_numpy(methods.ties(*given, density=1.0)), bound=1e-7)


def test_tsv_of_one_task_returns_that_task():
    base, tuned = make(1)
    result = methods.tsv(mx.array(base), arrays(*tuned), [1.0])
    assert_close(result, tuned[0].astype(float), bound=1e-6)


def test_tsv_joins_orthogonal_tasks_without_loss():
    base, _ = make()
    rng = np.random.default_rng(1)
    u, _ = np.linalg.qr(rng.standard_normal((30, 12)))
    v, _ = np.linalg.qr(rng.standard_normal((50, 12)))
    deltas = [(u[:, i : i + 4] * [3, 2, 1.5, 1]) @ v[:, i : i + 4].T for i in (0, 4, 8)]
    tuned = [(base + delta).astype(np.float32) for delta in deltas]
    result = methods.tsv(mx.array(base), arrays(*tuned), [1.0] * 3)
    assert_close(result, base + total(deltas), bound=1e-4)


def test_tsv_does_not_count_tasks_of_weight_0():
    base, tuned = make()
    start, changed = mx.array(base), arrays(*tuned)
    result = methods.tsv(start, changed, [1.0, 0.0, 0.5])
    expected = methods.tsv(start, changed[::2], [1.0, 0.5])
    assert_close(result, to_numpy(expected), bound=1e-7)
    assert_close(methods.tsv(start, changed, [0.0] * 3), base.astype(float), bound=0)


def test_tsv_whitens_what_the_tasks_share():
    """Two equal tasks of rank 1: the task once, with the norm of both together."""
    base = np.zeros((6, 6), np.float32)
    tau = np.zeros((6, 6), np.float32)
    tau[0, 0] = 1
    result = methods.tsv(mx.array(base), arrays(tau, tau), [1.0, 1.0])
    rng = np.linalg.svd(to_numpy(result), compute_uv=False)
    assert rng.max() <= 2 + 1e-6


def test_fisher():
    _, tuned = make()
    rng = np.random.default_rng(2)
    known = [rng.uniform(0, 1, (30, 50)).astype(np.float32) for _ in tuned]
    for information in known:
        information[0, :5] = 0
    w = [1.0, 2.0, 3.0]
    f = [a * k.astype(float) for a, k in zip(w, known, strict=True)]
    with np.errstate(invalid="ignore"):
        truth = total(a * t for a, t in zip(f, tuned, strict=True)) / total(f)
    truth[0, :5] = total(a * t for a, t in zip(w, tuned, strict=True))[0, :5] / 6
    assert_close(elementwise.fisher(arrays(*tuned), arrays(*known), w)[0], truth)


def test_whole_tensors_of_millions_keep_five_digits() -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((1500, 1201), dtype=np.float32)
    second = first + 0.1 * rng.standard_normal(first.shape, dtype=np.float32)
    settings = TensorSettings(weights=np.array([0.7, 0.3]))
    result, _ = merge_tensor(
        "slerp", None, [mx.array(first), mx.array(second)], settings, "tensor"
    )
    a, b = first.astype(np.float64), second.astype(np.float64)
    theta = np.arccos((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    truth = (np.sin(0.7 * theta) * a + np.sin(0.3 * theta) * b) / np.sin(theta)
    error = np.linalg.norm(np.array(result) - truth) / np.linalg.norm(truth)
    assert error < 1e-6
