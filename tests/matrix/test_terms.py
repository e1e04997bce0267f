import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.kernels import QuantizedWeight
from mlx_dora.matrix import Adapted, LowRank, exact_terms, row_geometry
from mlx_dora.matrix.terms import Terms, floored_norm, terms_of, trained_gain
from mlx_dora.matrix.weight import dense as unpacked
from mlx_dora.matrix.weight import product, row_squares
from tests.checks import assert_close, to_numpy


def make(out=40, width=96, r=4, dtype=mx.float32, size=0.1):
    rng = np.random.default_rng(0)
    weight = mx.array(rng.standard_normal((out, width)).astype(np.float32))
    a = mx.array(rng.standard_normal((width, r)).astype(np.float32))
    b = mx.array((size * rng.standard_normal((r, out))).astype(np.float32))
    return weight.astype(dtype), a, b


def low_rank(a, b, scale):
    return LowRank(lora_a=a, lora_b=b, scale=scale)


def pack(weight, bits):
    packed, scales, biases = mx.quantize(weight, 32, bits)
    return QuantizedWeight(
        weight=packed, scales=scales, biases=biases, group_size=32, bits=bits
    )


@pytest.mark.parametrize("bits", [None, 3, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_terms_match_float64(dtype, bits):
    weight, a, b = make(dtype=dtype)
    dense = to_numpy(weight)
    if bits:
        weight = pack(weight, bits)
        dense = to_numpy(weight.dequantize())
    update = (to_numpy(a) @ to_numpy(b)).T
    terms = exact_terms(weight, low_rank(a, b, 0.5))
    assert_close(terms.q0, (dense**2).sum(1))
    assert_close(terms.c, (dense * update).sum(1))
    assert_close(terms.p, (update**2).sum(1))
    assert_close(terms.norm, np.linalg.norm(dense + 0.5 * update, axis=1))
    assert terms.recomputed == 0


@pytest.mark.parametrize("share", [0.1, 3e-3, 3e-4, 1e-6])
def test_rows_that_nearly_cancel_are_recomputed_and_counted(share):
    weight, a, b = make(r=1)
    weight[5] = a[:, 0]
    b[0, 5] = -(1 - share)
    dense = to_numpy(weight) + (to_numpy(a) @ to_numpy(b)).T
    terms = exact_terms(weight, low_rank(a, b, 1.0))
    assert terms.recomputed == 1
    assert to_numpy(terms.norm)[5] == pytest.approx(
        np.linalg.norm(dense[5]), rel=1e-6 + 1e-7 / share
    )


def test_a_row_that_cancels_wholly_has_norm_zero():
    weight, a, b = make(r=1)
    weight[5] = a[:, 0]
    b[0, 5] = -1.0
    assert exact_terms(weight, low_rank(a, b, 1.0)).norm[5].item() == 0


@pytest.mark.parametrize("size", [1e-4, 0.1, 3.0])
def test_geometry_matches_float64(size):
    weight, a, b = make(size=size)
    update = (to_numpy(a) @ to_numpy(b)).T
    dense = to_numpy(weight)
    adapted = dense + 0.5 * update
    m = mx.array((1.1 * np.linalg.norm(dense, axis=1)).astype(np.float32))
    m = mx.where(mx.arange(m.size) == 2, -m, m)
    after = to_numpy(m)[:, None] * adapted / np.linalg.norm(adapted, axis=1)[:, None]
    unit = [v / np.linalg.norm(v, axis=1)[:, None] for v in (dense, after)]
    # 2·asin(chord / 2) keeps tiny angles, unlike arccos.
    angle = 2 * np.arcsin(np.linalg.norm(unit[0] - unit[1], axis=1) / 2)
    geometry = row_geometry(weight, Adapted(update=low_rank(a, b, 0.5), m=m))
    assert_close(geometry.angle, angle)
    delta_m = np.linalg.norm(after, axis=1) - np.linalg.norm(dense, axis=1)
    assert_close(geometry.delta_m, delta_m)
    assert geometry.mean_delta_m == pytest.approx(np.abs(delta_m).mean(), rel=1e-5)
    assert geometry.mean_delta_d == pytest.approx((1 - np.cos(angle)).mean(), rel=1e-4)


def test_zero_rows_have_no_angle():
    weight, a, b = make()
    weight[3] = 0.0
    b[:, 3] = 0.0
    adapted = Adapted(update=low_rank(a, b, 0.5), m=mx.zeros(40))
    geometry = row_geometry(weight, adapted)
    assert geometry.angle[3].item() == 0
    assert geometry.delta_m[3].item() == 0
    assert np.isfinite(to_numpy(geometry.angle)).all()


@pytest.mark.parametrize("bits", [None, 4])
def test_training_takes_a_stack_as_its_matrices(bits):
    weight, a, b = (mx.stack([v, 2 * v]) for v in make())
    stack = pack(weight, bits) if bits else weight
    update = low_rank(a, b, 0.5)
    terms = terms_of(row_squares(stack), product(stack, a), update)
    dense = to_numpy(unpacked(stack))
    for i, matrix in enumerate(update.matrices()):
        full = dense[i] + to_numpy(matrix.rows(slice(None)))
        assert_close(floored_norm(terms)[i], np.linalg.norm(full, axis=1))


def test_terms_serve_float64_as_they_serve_float32():
    weight, a, b = make()
    terms = exact_terms(weight, low_rank(a, b, 0.5))
    q0, c, p = (to_numpy(value) for value in (terms.q0, terms.c, terms.p))
    double = Terms(q0=q0, c=c, p=p, scale=0.5)
    np.testing.assert_allclose(to_numpy(terms.squared), double.squared, rtol=1e-6)
    np.testing.assert_allclose(to_numpy(terms.parts), double.parts, rtol=1e-6)
    assert np.array_equal(np.array(terms.cancelled), double.cancelled)


@pytest.mark.parametrize("wrong", ["in", "out", "rank"])
def test_factors_that_do_not_fit_are_refused_with_their_shapes(wrong):
    weight, a, b = make()
    a = a[1:] if wrong == "in" else a
    b = b[:, 1:] if wrong == "out" else b[1:] if wrong == "rank" else b
    with pytest.raises(DoRAError, match=r"of shape \(40, 96\); expected \(96, r\)"):
        exact_terms(weight, low_rank(a, b, 1.0))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_gain_of_training_has_the_gradient_of_m_alone(dtype):
    m = mx.array([3.0, -2.0, 0.0, 1.0]).astype(dtype)
    norm = mx.array([2.0, 3.0, 5.0, 0.0])  # m frozen at 0, and a row without direction
    pull = mx.array([1.5, 2.0, 7.0, 7.0])

    def loss(m, norm):
        return (trained_gain(m, norm) * pull).sum()

    assert_close(trained_gain(m, norm), np.array([1.5, -2 / 3, 0.0, 0.0]))
    dm, dn = mx.grad(loss, argnums=(0, 1))(m, norm)
    assert dm.dtype == dtype
    bound = 1e-6 if dtype == mx.float32 else 4e-3
    assert_close(dm, np.array([0.75, 2 / 3, 0.0, 0.0]), bound=bound)
    assert not dn.any()


def test_the_gain_of_training_keeps_no_norm_for_the_backward_pass():
    """Of the arrays that the gradient needs, only the gain is as large as a norm."""
    size = 1 << 20
    m, squares = mx.ones((size,)), mx.ones((size,))
    mx.eval(m, squares)

    def gain_of(m):
        return trained_gain(m, mx.stop_gradient(mx.sqrt(squares)))

    def held():
        mx.clear_cache()
        before = mx.get_active_memory()
        gain, pulled = mx.vjp(gain_of, [m], [m])
        mx.eval(gain)
        kept = mx.get_active_memory() - before
        mx.eval(pulled)
        return kept

    assert held() < 1.5 * 4 * size
