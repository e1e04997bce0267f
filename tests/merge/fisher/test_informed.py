"""Merging by Fisher information against Σ w F W' / Σ w F in float64."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.matrix import Adapted, LowRank
from mlx_dora.merge.adapters.dense import merge_informed
from mlx_dora.merge.adapters.factored import merge_matrix
from mlx_dora.merge.methods.settings import TensorSettings
from mlx_dora.merge.models.tensor import merge_informed_tensor
from tests.checks import assert_close, to_numpy
from tests.merge.matrices import adapted, make_input, make_weight
from tests.merge.oracle import total

ROWS, WIDTH = 40, 96


def shares_of(weights) -> np.ndarray:
    return np.tile(np.array(weights, float), (ROWS, 1))


def information(count: int, shape, seed: int = 5) -> list[mx.array]:
    """Information that spans small to large values, like real information."""
    rng = np.random.default_rng(seed)
    return [mx.array(np.exp(rng.normal(size=shape, scale=2)).astype(np.float32))
            for _ in range(count)]  # fmt: skip


def expected(parts, known, weights) -> np.ndarray:
    known = [to_numpy(information) for information in known]
    known = [
        information[:, None] if information.ndim == 1 else information
        for information in known
    ]
    top = total(w * f * p for w, f, p in zip(weights, known, parts, strict=True))
    return top / total(w * f for w, f in zip(weights, known, strict=True))


@pytest.mark.parametrize("bits", [None, 4])
def test_by_row_the_merge_is_exact(bits) -> None:
    weight, dense = make_weight(bits=bits)
    inputs = [make_input(dense, 4, 2.0, 1), make_input(dense, 16, 0.5, 2)]
    inputs.append(Adapted(update=make_input(dense, 3, 1.0, 3).update, m=None))
    weights = [0.2, 0.5, 0.3]
    known = information(3, ROWS)
    merged = merge_informed(weight, inputs, shares_of(weights), known, scale=3.0)
    assert merged.rank == 23
    assert merged.unknown == 0
    parts = [adapted(dense, adapted_input) for adapted_input in inputs]
    assert_close(adapted(dense, merged), expected(parts, known, weights))


@pytest.mark.parametrize("bits", [None, 4])
def test_by_element_the_merge_is_exact_at_full_rank(bits) -> None:
    weight, dense = make_weight(bits=bits)
    inputs = [make_input(dense, 4, 2.0, 1), make_input(dense, 6, 0.5, 2)]
    weights = [0.3, 0.7]
    known = information(2, (ROWS, WIDTH))
    parts = [adapted(dense, adapted_input) for adapted_input in inputs]
    truth = expected(parts, known, weights)
    full = merge_informed(
        weight, inputs, shares_of(weights), known, scale=3.0, rank=ROWS
    )
    assert_close(adapted(dense, full), truth)
    cut = merge_informed(weight, inputs, shares_of(weights), known, scale=3.0)
    assert cut.rank == 10
    assert 0 < cut.discarded < 0.5
    lengths = np.linalg.norm(truth, axis=1)
    assert_close(np.abs(to_numpy(cut.m)), lengths)  # the magnitude is not cut


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_equal_information_is_the_linear_mean(granularity: str) -> None:
    weight, dense = make_weight()
    inputs = [make_input(dense, 4, 2.0, 1), make_input(dense, 6, 0.5, 2)]
    shape = ROWS if granularity == "row" else (ROWS, WIDTH)
    known = [7.0 * mx.ones(shape)] * 2
    shares = shares_of([0.3, 0.7])
    merged = merge_informed(weight, inputs, shares, known, scale=1.0)
    linear = merge_matrix(weight, inputs, shares, method="linear", scale=1.0)
    assert_close(adapted(dense, merged), adapted(dense, linear), bound=1e-6)


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_copies_come_back_whatever_their_information(granularity: str) -> None:
    weight, dense = make_weight()
    first = make_input(dense, 4, 2.0, 1)
    update = first.update
    twice = LowRank(lora_a=2 * update.lora_a, lora_b=update.lora_b / 2, scale=2.0)
    copies = [first, replace(first, update=twice), first]
    shape = ROWS if granularity == "row" else (ROWS, WIDTH)
    known = information(3, shape)
    for rank in (None, 4):
        merged = merge_informed(
            weight, copies, shares_of([0.2, 0.5, 0.3]), known, scale=2.0, rank=rank
        )
        assert_close(adapted(dense, merged), adapted(dense, first), bound=1e-6)
        assert merged.discarded < 1e-10


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_elements_without_information_use_the_weights_and_are_counted(
    granularity,
) -> None:
    weight, dense = make_weight()
    inputs = [make_input(dense, 4, 2.0, 1), make_input(dense, 6, 0.5, 2)]
    shape = (ROWS,) if granularity == "row" else (ROWS, WIDTH)
    known = [item * (mx.arange(ROWS).reshape(-1, *[1] * (len(shape) - 1)) >= 3)
             for item in information(2, shape)]  # fmt: skip
    known[0] = mx.where(mx.arange(ROWS).reshape(-1, *[1] * (len(shape) - 1)) == 5,
                        0.0, known[0])  # fmt: skip
    shares = shares_of([0.25, 0.75])
    merged = merge_informed(weight, inputs, shares, known, scale=1.0, rank=ROWS)
    assert merged.unknown == 3 * WIDTH
    result = adapted(dense, merged)
    parts = [adapted(dense, adapted_input) for adapted_input in inputs]
    assert_close(result[:3], (0.25 * parts[0] + 0.75 * parts[1])[:3])
    assert_close(result[5:6], parts[1][5:6])  # the first has no information on it
    nothing = merge_informed(weight, inputs, shares, [known[0], None], scale=1.0)
    assert nothing.unknown == ROWS * WIDTH
    assert_close(adapted(dense, nothing), 0.25 * parts[0] + 0.75 * parts[1])


def test_a_negative_magnitude_and_a_zero_row() -> None:
    weight, dense = make_weight()
    assert isinstance(weight, mx.array)
    weight[5] = 0.0
    dense[5] = 0.0
    inputs = [make_input(dense, 4, 2.0, 1), make_input(dense, 6, 0.5, 2)]
    for adapted_input in inputs:
        assert adapted_input.m is not None
        adapted_input.update.lora_b[:, 5] = 0.0
        adapted_input.m[5] = 0.0
        adapted_input.m[7] = -adapted_input.m[7]
    known = information(2, (ROWS, WIDTH))
    merged = merge_informed(
        weight, inputs, shares_of([0.5, 0.5]), known, scale=1.0, rank=ROWS
    )
    parts = [adapted(dense, adapted_input) for adapted_input in inputs]
    assert_close(adapted(dense, merged), expected(parts, known, [0.5, 0.5]))
    assert np.isfinite(to_numpy(merged.lora_b)).all()


def test_weights_by_row_need_information_by_row() -> None:
    weight, dense = make_weight()
    inputs = [make_input(dense, 4, 2.0, 1), make_input(dense, 6, 0.5, 2)]
    t = np.linspace(0.1, 0.9, ROWS)
    shares = np.stack([1 - t, t], axis=1)
    known = information(2, ROWS)
    merged = merge_informed(weight, inputs, shares, known, scale=1.0)
    parts = [adapted(dense, adapted_input) for adapted_input in inputs]
    truth = expected(parts, known, [(1 - t)[:, None], t[:, None]])
    assert_close(adapted(dense, merged), truth)
    by_element = information(2, (ROWS, WIDTH))
    with pytest.raises(DoRAError, match="one weight per adapter, not one per row"):
        merge_informed(weight, inputs, shares, by_element, scale=1.0)


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_tensors_of_models(granularity: str) -> None:
    rng = np.random.default_rng(0)
    tensors = [rng.standard_normal((ROWS, WIDTH)).astype(np.float32) for _ in range(2)]
    shape = ROWS if granularity == "row" else (ROWS, WIDTH)
    known = information(2, shape)
    settings = TensorSettings(weights=np.array([1.0, 3.0]))
    arrays = [mx.array(tensor) for tensor in tensors]
    result, unknown = merge_informed_tensor(arrays, settings, known)
    assert unknown == 0
    assert_close(result, expected(tensors, known, [1.0, 3.0]))
    mean, unknown = merge_informed_tensor(arrays, settings, [known[0], None])
    assert unknown == ROWS * WIDTH
    assert_close(mean, (tensors[0] + 3.0 * tensors[1]) / 4)
