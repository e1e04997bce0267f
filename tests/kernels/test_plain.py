import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import openblas
from mlx_dora.errors import DoRAError
from mlx_dora.kernels import (
    QuantizedWeight,
    adapted_norm,
    dora_scale,
    fused_weight,
    normalize_rows,
    plain,  # the ops in plain MLX
)
from mlx_dora.kernels.fusing import dense_fused
from mlx_dora.matrix.low_rank import Adapted, LowRank
from mlx_dora.matrix.weight import row_blocks, row_squares
from tests.checks import BOUNDS, assert_close, to_numpy

DTYPES = list(BOUNDS)


def normal(*shape, dtype=mx.float32, seed=0, scale=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return mx.array(values.astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (33, 1000), (5, 4096)])
def test_normalize_rows_matches_float64(shape, dtype):
    weight, magnitude = normal(*shape, dtype=dtype), normal(shape[0], seed=1)
    rescaled, norm = normalize_rows(weight, magnitude)
    truth = np.linalg.norm(to_numpy(weight), axis=1)
    assert_close(norm, truth)
    expected = to_numpy(magnitude)[:, None] * to_numpy(weight) / truth[:, None]
    assert_close(rescaled, expected, dtype)
    assert rescaled.dtype == dtype
    assert norm.dtype == mx.float32


def test_normalize_rows_gradient_matches_finite_differences():
    weight, pull = normal(4, 6), normal(4, 6, seed=2)

    def loss(w):
        return (normalize_rows(w)[0] * pull).sum()

    w, p = to_numpy(weight), to_numpy(pull)
    expected = np.zeros_like(w)
    for i in np.ndindex(*w.shape):
        step = np.zeros_like(w)
        step[i] = 1e-6
        value = [
            (v / np.linalg.norm(v, axis=1, keepdims=True) * p).sum()
            for v in (w + step, w - step)
        ]
        expected[i] = (value[0] - value[1]) / 2e-6
    assert_close(mx.grad(loss)(weight), expected)


def test_zero_rows_stay_zero():
    weight = mx.array([[0.0, 0.0], [3.0, 4.0]])
    rescaled, norm = normalize_rows(weight)
    assert rescaled.tolist() == [[0.0, 0.0], [0.6000000238418579, 0.800000011920929]]
    assert norm.tolist() == [0.0, 5.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 8, 64])
@pytest.mark.parametrize("shape", [(3, 31), (33, 1000), (257, 65)])
def test_adapted_norm_matches_float64(shape, r, dtype):
    out, width = shape
    weight = normal(out, width, dtype=dtype)
    a, b = normal(width, r, seed=1), normal(r, out, seed=2, scale=0.1)
    update = 0.5 * (to_numpy(a) @ to_numpy(b)).T
    expected = np.linalg.norm(to_numpy(weight) + update, axis=1)
    norm = adapted_norm(weight, a, b, 0.5)
    assert norm.dtype == mx.float32
    assert_close(norm, expected, dtype)
    squared = row_squares(weight)
    assert mx.array_equal(adapted_norm(weight, a, b, 0.5, squared_base=squared), norm)


def test_adapted_norm_is_a_constant_of_the_backward_pass():
    weight, a, b = normal(6, 5), normal(5, 2, seed=1), normal(2, 6, seed=2)
    gradients = mx.grad(
        lambda w, a, b: adapted_norm(w, a, b, 1.0).sum(), argnums=(0, 1, 2)
    )(weight, a, b)
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("share", [3e-2, 3e-3, 3e-4, 0.0])
def test_a_cancelled_row_is_floored_not_nan(share):
    weight, a = normal(8, 64), normal(64, 1, seed=1)
    weight[0] = a[:, 0]
    b = mx.zeros((1, 8))
    b[0, 0] = -(1 - share)  # s·BA = -(1 - share)·W on row 0
    norm = to_numpy(adapted_norm(weight, a, b, 1.0))
    base = np.linalg.norm(to_numpy(a))
    floor = 2.0**-10 * np.sqrt(2) * base
    assert np.isfinite(norm).all()
    assert norm[0] >= 0.9 * floor
    if share > 1e-2:  # above the noise, it is accurate to one percent
        assert norm[0] == pytest.approx(share * base, rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_weight_matches_float64_and_rounds_once(dtype):
    weight, m = normal(33, 65, dtype=dtype), normal(33, seed=3)
    a, b = normal(65, 4, seed=1), normal(4, 33, seed=2, scale=0.1)
    full = to_numpy(weight) + 0.5 * (to_numpy(a) @ to_numpy(b)).T
    norm = np.linalg.norm(full, axis=1, keepdims=True)
    expected = to_numpy(m)[:, None] * full / norm
    fused = fused_weight(weight, a, b, 0.5, m)
    assert fused.dtype == dtype
    assert_close(fused, expected, dtype)


def test_fused_weight_in_blocks_equals_one_block(monkeypatch):
    weight, a, b = normal(64, 32), normal(32, 4, seed=1), normal(4, 64, seed=2)
    m = normal(64, seed=3)
    whole = fused_weight(weight, a, b, 0.5, m)
    monkeypatch.setattr("mlx_dora.matrix.weight._BLOCK", 32 * 7)
    assert len(list(row_blocks(weight))) == 10
    assert_close(fused_weight(weight, a, b, 0.5, m), to_numpy(whole), bound=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_dora_scale_and_its_gradients_match_float64(dtype, bias):
    t, r, out, s = 7, 5, 33, 0.7
    y, h = normal(2, t, out, dtype=dtype), normal(2, t, r, seed=1, dtype=dtype)
    b, m = normal(r, out, seed=2), normal(out, seed=3)
    n = mx.abs(normal(out, seed=4)) + 0.5
    offset = normal(out, seed=5) if bias else None
    dy = normal(2, t, out, seed=6)

    def run(y, h, b, m):
        return (dora_scale(y, h, b, s, m, n, offset).astype(mx.float32) * dy).sum()

    gradients = mx.grad(run, argnums=(0, 1, 2, 3))(y, h, b, m)
    y64, h64, b64, m64, n64, dy64 = map(to_numpy, (y, h, b, m, n, dy))
    u = y64 + s * h64 @ b64
    g = m64 / n64
    flat = (g * dy64).reshape(-1, out)
    expected = (
        g * dy64,
        s * (g * dy64) @ b64.T,
        s * h64.reshape(-1, r).T @ flat,
        (dy64 * u / n64).sum((0, 1)),
    )
    out_ = dora_scale(y, h, b, s, m, n, offset)
    assert out_.dtype == dtype
    assert_close(out_, g * u + (to_numpy(offset) if offset is not None else 0), dtype)
    for actual, value in zip(gradients, expected, strict=True):
        assert_close(actual, value, dtype)


def test_misfits_are_refused_in_one_line():
    weight, a, b = normal(4, 6), normal(6, 2), normal(2, 4)
    for bad in [(normal(5, 2), b), (a, normal(2, 5)), (normal(6, 3), b)]:
        with pytest.raises(DoRAError, match="do not fit a weight of shape"):
            adapted_norm(weight, *bad, 1.0)
        with pytest.raises(DoRAError, match="do not fit a weight of shape"):
            fused_weight(weight, *bad, 1.0, normal(4))
    with pytest.raises(DoRAError, match=r"m has shape \(3,\)"):
        dora_scale(normal(2, 4), normal(2, 2), b, 1.0, normal(3), normal(4))
    with pytest.raises(DoRAError, match="magnitude has shape"):
        normalize_rows(weight, normal(3))


def test_a_packed_weight_knows_its_dense_shape_and_rows():
    dense = normal(12, 96)
    for bits in (2, 3, 5, 8):
        packed = QuantizedWeight(
            **dict(
                zip(
                    ("weight", "scales", "biases"),
                    mx.quantize(dense, 32, bits),
                    strict=True,
                )
            ),
            group_size=32,
            bits=bits,
        )
        assert packed.shape == (12, 96)
        some = packed.rows(mx.array([3, 1]))
        assert mx.array_equal(some.dequantize(), packed.dequantize()[mx.array([3, 1])])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_fuse_gives_the_same_bits_in_larger_blocks(dtype: mx.Dtype) -> None:
    """As in 0.1, which read 2^16 elements at a time."""
    rng = np.random.default_rng(0)
    out, width, rank, step = 300, 2048, 16, 32

    def made(*shape: int) -> mx.array:
        return mx.array(0.02 * rng.standard_normal(shape).astype(np.float32))

    weight, a, b = made(out, width).astype(dtype), made(width, rank), made(rank, out)
    m = mx.abs(made(out)) + 1
    update = LowRank(lora_a=a, lora_b=b, scale=2.0)
    expected = []
    with openblas.one_thread():  # its sums depend on the number of threads
        for start in range(0, out, step):
            index = slice(start, min(start + step, out))
            rows = weight[index].astype(mx.float32) + update.rows(index)
            expected.append(plain.normalize_rows(rows, m[index])[0].astype(dtype))
            mx.eval(expected[-1])
    fused = dense_fused(weight, Adapted(update=update, m=m), dtype)
    assert mx.array_equal(fused, mx.concatenate(expected))
