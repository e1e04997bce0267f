"""Factored merges against the dense computation in float64."""

import tracemalloc

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.matrix import Adapted, Factors, LowRank, QuantizedWeight, Weight
from mlx_dora.merge.adapters.factored import merge_matrix
from tests.checks import assert_close, to_numpy
from tests.merge.matrices import adapted, make_input, make_weight
from tests.merge.names import MEANS, SUMS
from tests.merge.oracle import (
    dense_karcher,
    dense_magnitude_weighted,
    dense_nmean,
    dense_slerp,
    total,
)


def shares_of(weights, rows=40):
    return np.tile(np.array(weights, float), (rows, 1))


def expected(method, dense, parts, weights):
    if method == "slerp":
        return dense_slerp(parts[0], parts[1], weights[1])
    if method == "karcher":
        return dense_karcher(parts, weights)
    if method == "nmean":
        return dense_nmean(parts, weights)
    if method == "magnitude_weighted":
        return dense_magnitude_weighted(parts, dense, weights)
    merged = total(w * part for w, part in zip(weights, parts, strict=True))
    return merged + (1 - sum(weights)) * dense


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", [*MEANS, *SUMS])
def test_two_adapters_of_different_rank_and_scale(method, bits):
    weight, dense = make_weight(bits=bits)
    inputs = [make_input(dense, 4, 2.0, 1), make_input(dense, 16, 0.5, 2)]
    weights = [0.3, 0.7] if method in MEANS or method == "linear" else [0.5, 0.9]
    merged = merge_matrix(weight, inputs, shares_of(weights), method=method, scale=3.0)
    assert merged.rank == 20
    parts = [adapted(dense, adapted_input) for adapted_input in inputs]
    assert_close(adapted(dense, merged), expected(method, dense, parts, weights))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", ["karcher", "nmean", "magnitude_weighted", "linear"])
def test_eight_adapters(method, bits):
    weight, dense = make_weight(bits=bits)
    inputs = [make_input(dense, 2 + i, 0.5 + i, i, size=0.2) for i in range(8)]
    inputs[3] = Adapted(update=inputs[3].update, m=None)  # LoRA
    weights = [(1 + i) / 36 for i in range(8)]
    merged = merge_matrix(weight, inputs, shares_of(weights), method=method, scale=1.0)
    parts = [adapted(dense, adapted_input) for adapted_input in inputs]
    assert_close(adapted(dense, merged), expected(method, dense, parts, weights))


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_slerp_at_its_ends_and_in_the_middle(t):
    weight, dense = make_weight()
    inputs = [make_input(dense, 4, 1.0, 1), make_input(dense, 4, 1.0, 2)]
    merged = merge_matrix(
        weight, inputs, shares_of([1 - t, t]), method="slerp", scale=1.0
    )
    a, b = (adapted(dense, adapted_input) for adapted_input in inputs)
    result = adapted(dense, merged)
    if t == 0.5:  # at equal distance from both
        assert_close(result, dense_slerp(a, b, t))
        unit = result / np.linalg.norm(result, axis=1, keepdims=True)
        cosines = [
            (unit * x / np.linalg.norm(x, axis=1)[:, None]).sum(1) for x in (a, b)
        ]
        np.testing.assert_allclose(*cosines, rtol=1e-6)
    else:
        assert_close(result, b if t else a)


@pytest.mark.parametrize("method", [*MEANS, "linear"])
def test_order_and_size_of_the_weights_do_not_matter(method):
    weight, dense = make_weight()
    inputs = [make_input(dense, 4, 2.0, 1), make_input(dense, 6, 0.5, 2)]
    first = merge_matrix(
        weight, inputs, shares_of([0.2, 0.8]), method=method, scale=1.0
    )
    other = merge_matrix(
        weight, inputs[::-1], shares_of([0.8, 0.2]), method=method, scale=1.0
    )
    assert_close(adapted(dense, first), adapted(dense, other), bound=1e-6)


def test_each_row_may_have_its_own_t():
    weight, dense = make_weight()
    inputs = [make_input(dense, 4, 1.0, 1), make_input(dense, 4, 1.0, 2)]
    t = np.linspace(0, 1, 40)
    shares = np.stack([1 - t, t], axis=1)
    merged = merge_matrix(weight, inputs, shares, method="slerp", scale=1.0)
    a, b = (adapted(dense, adapted_input) for adapted_input in inputs)
    rows = [dense_slerp(a[[j]], b[[j]], t[j])[0] for j in range(40)]
    assert_close(adapted(dense, merged), np.array(rows))


@pytest.mark.parametrize("method", [*MEANS, "linear"])
@pytest.mark.parametrize("count", [2, 3])
def test_copies_give_the_adapter_back_even_after_a_cut(method, count):
    if method == "slerp" and count > 2:
        return
    weight, dense = make_weight()
    first = make_input(dense, 4, 2.0, 1)
    copies = [first] * count
    shares = shares_of([1 / count] * count)
    merged = merge_matrix(weight, copies, shares, method=method, scale=2.0)
    assert merged.rank == 4  # an equal A appears once
    assert_close(adapted(dense, merged), adapted(dense, first), bound=1e-6)
    # Copies that do not share A bit for bit: twice A, half of B.
    update = first.update
    twice = LowRank(lora_a=2 * update.lora_a, lora_b=update.lora_b / 2, scale=2.0)
    copies = [first, *[Adapted(update=twice, m=first.m)] * (count - 1)]
    cut = merge_matrix(weight, copies, shares, method=method, scale=2.0, rank=4)
    assert cut.rank == 4
    assert cut.discarded < 1e-12
    assert_close(adapted(dense, cut), adapted(dense, first), bound=1e-6)


def test_a_cut_is_optimal_and_reports_its_loss():
    rng = np.random.default_rng(0)
    a, up = rng.standard_normal((30, 12)), rng.standard_normal((20, 12))
    weight = rng.uniform(0.5, 2, 20)
    cut, lost = Factors(a=a, b=up).cut(5, weight)
    full = weight[:, None] * (up @ a.T)
    sizes = np.linalg.svd(full, compute_uv=False)
    error = np.linalg.norm(weight[:, None] * (cut.b @ cut.a.T) - full)
    assert error == pytest.approx(np.sqrt((sizes[5:] ** 2).sum()), rel=1e-9)
    assert lost == pytest.approx((sizes[5:] ** 2).sum() / (sizes**2).sum(), rel=1e-9)


def test_a_negative_magnitude_reverses_the_row():
    weight, dense = make_weight()
    inputs = [make_input(dense, 4, 1.0, 1), make_input(dense, 4, 1.0, 2)]
    for adapted_input in inputs:
        adapted_input.m[3] = -adapted_input.m[3]  # pyright: ignore[reportOptionalSubscript]
    merged = merge_matrix(
        weight, inputs, shares_of([0.4, 0.6]), method="slerp", scale=1.0
    )
    parts = [adapted(dense, adapted_input) for adapted_input in inputs]
    assert_close(adapted(dense, merged), dense_slerp(parts[0], parts[1], 0.6))
    assert to_numpy(merged.m)[3] < 0
    assert merged.opposed == 0


@pytest.mark.parametrize("method", MEANS)
def test_opposite_rows_keep_the_heavier_direction_and_are_counted(method):
    weight, dense = make_weight()
    first = make_input(dense, 4, 1.0, 1)
    assert first.m is not None
    turned = mx.where(mx.arange(40) < 3, -first.m, first.m)
    inputs = [first, Adapted(update=first.update, m=turned)]
    # Rows that moved alike have equal weights in magnitude_weighted.
    merged = merge_matrix(
        weight, inputs, shares_of([0.5, 0.5]), method=method, scale=1.0
    )
    assert merged.opposed == 3
    assert_close(adapted(dense, merged), adapted(dense, first), bound=1e-6)


def test_zero_rows_stay_zero_and_are_counted():
    weight, dense = make_weight()
    assert isinstance(weight, mx.array)
    weight[5] = 0.0
    dense[5] = 0.0
    inputs = [make_input(dense, 4, 1.0, i) for i in (1, 2)]
    for adapted_input in inputs:
        adapted_input.update.lora_b[:, 5] = 0.0
        adapted_input.m[5] = 0.0  # pyright: ignore[reportOptionalSubscript]
    merged = merge_matrix(
        weight, inputs, shares_of([0.4, 0.6]), method="karcher", scale=1.0
    )
    assert merged.zero == 1
    assert (adapted(dense, merged)[5] == 0).all()
    assert np.isfinite(to_numpy(merged.lora_b)).all()


@pytest.mark.parametrize("method", ["slerp", "linear"])
@pytest.mark.parametrize("share", [3e-2, 3e-4])
def test_rows_that_nearly_cancel_are_computed_densely_and_counted(method, share):
    weight, dense = make_weight()
    first, other = make_input(dense, 1, 1.0, 1), make_input(dense, 3, 1.0, 2)
    first.update.lora_a[:, 0] = mx.array(dense[7].astype(np.float32))
    first.update.lora_b[0, 7] = -(1 - share)
    inputs = [first, other]
    merged = merge_matrix(
        weight, inputs, shares_of([0.5, 0.5]), method=method, scale=1.0
    )
    assert merged.recomputed >= 1
    parts = [adapted(dense, each) for each in inputs]
    assert_close(
        adapted(dense, merged)[7:8],
        expected(method, dense, parts, [0.5, 0.5])[7:8],
        bound=1e-5 + 1e-7 / share,  # limited by the precision of the input
    )


def test_a_sum_of_opposite_rows_has_the_remaining_length():
    weight, dense = make_weight()
    first = make_input(dense, 4, 1.0, 1)
    assert first.m is not None
    inputs = [first, Adapted(update=first.update, m=-0.9 * first.m)]
    merged = merge_matrix(
        weight, inputs, shares_of([0.5, 0.5]), method="linear", scale=1.0
    )
    assert_close(adapted(dense, merged), 0.05 * adapted(dense, first), bound=1e-5)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", [*MEANS, *SUMS])
def test_no_array_of_the_weights_size_is_made(method, bits):
    """Neither by MLX nor by NumPy, which tracemalloc measures."""
    rows = width = 2048  # large compared with the blocks in use
    weight = mx.random.normal((rows, width)).astype(mx.bfloat16)
    dense = to_numpy(weight)
    count = 2 if method == "slerp" else 3
    inputs = [make_input(dense, 8, 1.0, i) for i in range(count)]
    given: Weight = weight
    if bits is not None:
        packed, scales, biases = mx.quantize(weight, 32, bits)
        given = QuantizedWeight(
            weight=packed, scales=scales, biases=biases, group_size=32, bits=bits
        )
        mx.eval(packed, scales, biases)
    mx.eval([adapted_input.m for adapted_input in inputs])
    shares = shares_of([1 / count] * count, rows)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    try:
        merge_matrix(given, inputs, shares, method=method, scale=1.0, rank=8)
        _, by_numpy = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert mx.get_peak_memory() - before < 4 * rows * width
    assert by_numpy < 4 * rows * width
