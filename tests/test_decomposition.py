import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import DoRAError, dora_decompose, dora_merge
from tests.checks import BOUNDS, assert_close, to_numpy


def matrix(dtype=mx.float32, seed=0):
    values = np.random.default_rng(seed).standard_normal((33, 65))
    weight = mx.array(values.astype(np.float32)).astype(dtype)
    return mx.where(mx.arange(33)[:, None] == 4, mx.array(0, dtype), weight)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_decompose_then_recombine_gives_the_weight_back(dtype):
    weight = matrix(dtype)
    m, direction = dora_decompose(weight)
    assert m.dtype == mx.float32
    assert direction.dtype == dtype
    assert_close(m, np.linalg.norm(to_numpy(weight), axis=1))
    assert_close(to_numpy(m)[:, None] * to_numpy(direction), to_numpy(weight), dtype)
    assert m[4].item() == 0
    assert (direction[4] == 0).all()


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_merge_without_change_returns_the_same_bits(dtype):
    weight = matrix(dtype)
    merged = dora_merge(weight, mx.zeros(33), mx.zeros((33, 65)))
    assert mx.array_equal(merged, weight)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_merge_matches_float64(dtype):
    weight, delta_v = matrix(dtype), matrix(seed=1) * 0.1
    delta_m = mx.random.normal((33,)) * 0.1
    base, change = to_numpy(weight), to_numpy(delta_v)
    adapted = base + change
    norm = np.linalg.norm(adapted, axis=1)
    m = np.linalg.norm(base, axis=1) + to_numpy(delta_m)
    gain = np.divide(m, norm, out=np.zeros_like(m), where=norm > 0)
    merged = dora_merge(weight, delta_m, delta_v)
    assert merged.dtype == dtype
    assert_close(merged, gain[:, None] * adapted, dtype)


def test_eps_shortens_the_direction():
    weight = mx.array([[3.0, 4.0], [0.0, 0.0]])
    m, direction = dora_decompose(weight, eps=5.0)
    assert m.tolist() == [5.0, 0.0]
    assert_close(direction, np.array([[0.3, 0.4], [0, 0]]))


def test_misuse_is_refused():
    with pytest.raises(DoRAError, match="float matrix"):
        dora_decompose(mx.zeros((2, 2), dtype=mx.uint32))
    with pytest.raises(DoRAError, match="eps must be at least 0"):
        dora_decompose(mx.ones((2, 2)), eps=float("nan"))
    with pytest.raises(DoRAError, match="expected"):
        dora_merge(mx.ones((2, 3)), mx.ones(3), mx.ones((2, 3)))
