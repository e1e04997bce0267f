"""Merges in a space against dense float64 computations of the definitions."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.matrix import Adapted, LowRank
from mlx_dora.merge.adapters.dense import Options, merge_dense
from mlx_dora.merge.adapters.factored import MergedMatrix
from mlx_dora.merge.adapters.in_space import merge_in_space
from mlx_dora.merge.methods import METHODS
from mlx_dora.merge.methods.spaces import SPACES
from tests.checks import assert_close, to_numpy
from tests.merge.matrices import adapted, make_input, make_weight
from tests.merge.methods.test_coordinates import FACTORED
from tests.merge.methods.test_elementwise import ties_truth
from tests.merge.oracle import total

Rule = Callable[[list[np.ndarray], list[float]], np.ndarray]
DENSITY = 0.4
RANK = 7


def merge(
    weight: object,
    inputs: list[Adapted],
    method: str,
    space: str = "core",
    weights: list[float] | None = None,
    rank: int | None = None,
    scale: float = 3.0,
    **options: object,
) -> MergedMatrix:
    """Merge with the same weights for all rows; a space of a rank gets `RANK`."""
    weights = weights or [1.0] * len(inputs)
    rows = inputs[0].update.lora_b.shape[1]
    density = options.pop("density", DENSITY)
    if METHODS[method].density is not None:
        options["density"] = density
    return merge_in_space(
        weight,  # pyright: ignore[reportArgumentType]
        inputs,
        np.tile(np.array(weights), (rows, 1)),
        method=method,
        space=SPACES[space],
        scale=scale,
        rank=RANK if SPACES[space].needs_rank and rank is None else rank,
        options=Options(**options),  # pyright: ignore[reportArgumentType]
    )


def three(dense: np.ndarray) -> list[Adapted]:
    """DoRA and LoRA adapters with mixed ranks and scales."""
    first, second, third = (
        make_input(dense, rank, scale, seed)
        for seed, (rank, scale) in enumerate([(4, 2.0), (6, 0.5), (3, 1.0)])
    )
    return [first, replace(second, m=None), third]


def parts_of(dense: np.ndarray, one: Adapted) -> tuple[np.ndarray, np.ndarray]:
    """The update and the magnitude of an adapter, float64."""
    update = one.update.scale * (to_numpy(one.update.lora_a) @ to_numpy(
        one.update.lora_b)).T  # fmt: skip
    length = np.linalg.norm(dense + update, axis=1)
    return update, length if one.m is None else to_numpy(one.m)


def bases(inputs: list[Adapted]) -> tuple[np.ndarray, np.ndarray]:
    """Bases of core space from full SVDs of the stacked factors."""
    b = np.hstack([i.update.scale * to_numpy(i.update.lora_b).T for i in inputs])
    a = np.hstack([to_numpy(i.update.lora_a) for i in inputs])
    return tuple(np.linalg.svd(x)[0][:, : x.shape[1]] for x in (b, a))  # pyright: ignore[reportReturnType]


def ties_rule(changes: list[np.ndarray], weights: list[float]) -> np.ndarray:
    return ties_truth(changes, weights, [DENSITY] * len(changes), True)


def dare_rule(changes: list[np.ndarray], weights: list[float]) -> np.ndarray:
    kept = []
    for i, change in enumerate(changes):
        key = mx.random.key(5 + 1_000_003 * i)
        mask = mx.random.bernoulli(DENSITY, (change.size,), key=key)
        kept.append(change * np.array(mask).reshape(change.shape) / DENSITY)
    return total(w * k for w, k in zip(weights, kept, strict=True))


def sum_rule(changes: list[np.ndarray], weights: list[float]) -> np.ndarray:
    return total(w * change for w, change in zip(weights, changes, strict=True))


def tsv_rule(changes: list[np.ndarray], weights: list[float]) -> np.ndarray:
    if changes[0].ndim < 2:
        return sum_rule(changes, weights) / sum(weights)
    share = min(changes[0].shape) // len(changes)
    lefts, sizes, rights = [], [], []
    for w, change in zip(weights, changes, strict=True):
        u, s, v = np.linalg.svd(w * change, full_matrices=False)
        kept = min(share, int((s > 1e-5 * s[0]).sum()))
        lefts.append(u[:, :kept])
        sizes.append(s[:kept])
        rights.append(v[:kept].T)
    ends = []
    for columns in (np.hstack(lefts), np.hstack(rights)):
        u, _, v = np.linalg.svd(columns, full_matrices=False)
        ends.append(u @ v)
    return (ends[0] * np.concatenate(sizes)) @ ends[1].T


def iso_rule(changes: list[np.ndarray], weights: list[float]) -> np.ndarray:
    merged = sum_rule(changes, weights)
    if merged.ndim < 2:
        return merged / sum(weights)
    u, s, v = np.linalg.svd(merged)
    return s.mean() * (u @ v)


TRUTHS: dict[str, Rule] = {
    "task_arithmetic": sum_rule,
    "ties": ties_rule,
    "dare": dare_rule,
    "tsv": tsv_rule,
    "iso": iso_rule,
}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", TRUTHS)
def test_core_space_is_the_dense_float64_computation(
    method: str, bits: int | None
) -> None:
    """Directions in the cores, lengths on their own; DoRA and LoRA, mixed ranks."""
    weight, dense = make_weight(bits=bits)
    inputs, weights = three(dense), [1.0, 0.5, 2.0]
    seed: dict[str, Any] = {"seed": 5} if "seed" in METHODS[method].parameters else {}
    merged = merge(weight, inputs, method, weights=weights, **seed)
    left, right = bases(inputs)
    updates, lengths = zip(*(parts_of(dense, one) for one in inputs), strict=True)
    norm = np.linalg.norm(dense, axis=1)
    cores = [left.T @ update @ right for update in updates]
    direction = dense + left @ TRUTHS[method](cores, weights) @ right.T
    length = norm + TRUTHS[method]([m - norm for m in lengths], weights)
    unit = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    truth = np.maximum(length, 0)[:, None] * unit
    assert merged.rank == 13
    assert_close(adapted(dense, merged), truth, bound=1e-5)
    assert_close(merged.m, np.maximum(length, 0), bound=1e-5)
    change = total([truth, -dense])
    assert_close(adapted(dense, merged) - dense, change, bound=1e-5)


def test_knots_is_the_dense_float64_computation() -> None:
    weight, dense = make_weight()
    inputs, weights = three(dense), [1.0, 0.5, 2.0]
    merged = merge(weight, inputs, "ties", "knots", weights=weights, magnitudes="own")
    updates = [parts_of(dense, one)[0] for one in inputs]
    u, s, v = np.linalg.svd(np.hstack(updates), full_matrices=False)
    sides = np.split(s[:13, None] * v[:13], 3, axis=1)
    truth = dense + u[:, :13] @ ties_rule(sides, weights)
    assert_close(adapted(dense, merged), truth, bound=1e-5)


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("method", ["task_arithmetic", "iso", "tsv"])
def test_spectral_methods_do_not_depend_on_the_space(method: str, space: str) -> None:
    """With equal ranks, so that tsv keeps the same number of singular vectors."""
    weight, dense = make_weight()
    inputs = [make_input(dense, 4, 1.0, seed) for seed in range(2)]
    result = merge(weight, inputs, method, space)
    options = Options()
    other = merge_dense(
        weight, inputs, np.ones((40, 2)), method=method, scale=1.0, rank=8,
        options=options,
    )  # fmt: skip
    assert_close(adapted(dense, result), adapted(dense, other), bound=1e-5)


@pytest.mark.parametrize("space", FACTORED)
@pytest.mark.parametrize("method", ["ties", "dare", "tsv", "iso", "della", "sce"])
def test_the_rank_is_at_most_the_sum_or_the_rank_asked_for(
    method: str, space: str
) -> None:
    weight, dense = make_weight()
    inputs = three(dense)
    merged = merge(weight, inputs, method, space)
    most = RANK if space == "ctm" else 13
    assert merged.rank == most
    assert merged.discarded == 0.0
    assert merged.lora_b.shape == (most, 40)
    cut = merge(weight, inputs, method, space, rank=5)
    assert cut.rank == 5
    assert (cut.discarded == 0.0) == (space == "ctm")  # by construction


def test_a_cut_is_the_best_of_its_rank() -> None:
    """In the norm of the merged rows W', as for the methods of rows."""
    weight, dense = make_weight()
    inputs = three(dense)
    full, cut = (merge(weight, inputs, "ties", rank=rank) for rank in (None, 5))
    assert_close(cut.m, to_numpy(full.m), bound=1e-7)
    update = 3.0 * (to_numpy(full.lora_a) @ to_numpy(full.lora_b)).T
    gain = to_numpy(full.m) / np.linalg.norm(dense + update, axis=1)
    sizes = np.linalg.svd(gain[:, None] * update, compute_uv=False)
    lost = 3.0 * (to_numpy(cut.lora_a) @ to_numpy(cut.lora_b)).T - update
    error = np.linalg.norm(gain[:, None] * lost)
    assert error == pytest.approx(np.sqrt((sizes[5:] ** 2).sum()), rel=1e-4)
    share = (sizes[5:] ** 2).sum() / (sizes**2).sum()
    assert cut.discarded == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("space", FACTORED)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare", "tsv"])
@pytest.mark.parametrize("m", ["dora", "lora"])
def test_one_adapter_comes_back(method: str, space: str, m: str) -> None:
    weight, dense = make_weight()
    (first,) = three(dense)[:1]
    first = first if m == "dora" else replace(first, m=None)
    merged = merge(weight, [first], method, space, density=1.0)
    assert merged.rank == 4
    assert_close(adapted(dense, merged), adapted(dense, first), bound=1e-6)


@pytest.mark.parametrize("space", FACTORED)
def test_copies_add_no_rank_and_come_back(space: str) -> None:
    weight, dense = make_weight()
    first = make_input(dense, 4, 2.0, 1)
    update = first.update
    twice = LowRank(lora_a=2 * update.lora_a, lora_b=update.lora_b / 2, scale=2.0)
    copies = [first, Adapted(update=twice, m=first.m), first]
    merged = merge(weight, copies, "ties", space, density=1.0)
    assert merged.rank == 4
    assert_close(adapted(dense, merged), adapted(dense, first), bound=1e-6)


@pytest.mark.parametrize("space", FACTORED)
@pytest.mark.parametrize("method", ["ties", "dare", "tsv", "iso", "sce"])
def test_adapters_that_change_nothing_give_the_base(method: str, space: str) -> None:
    weight, dense = make_weight()
    update = make_input(dense, 4, 1.0, 1).update
    zero = replace(update, lora_b=mx.zeros_like(update.lora_b))
    norm = mx.array(np.linalg.norm(dense, axis=1).astype(np.float32))
    inputs = [Adapted(update=zero, m=norm), Adapted(update=zero, m=None)]
    merged = merge(weight, inputs, method, space)
    assert merged.rank == 1
    assert not to_numpy(merged.lora_b).any() or not to_numpy(merged.lora_a).any()
    assert_close(adapted(dense, merged), dense, bound=1e-6)


def test_zero_rows_stay_zero_and_are_counted() -> None:
    weight, dense = make_weight()
    assert isinstance(weight, mx.array)
    weight[5], dense[5] = 0.0, 0.0
    inputs = three(dense)
    for one in inputs:
        one.update.lora_b[:, 5] = 0.0
        if one.m is not None:
            one.m[5] = 0.0
    merged = merge(weight, inputs, "ties")
    assert merged.zero >= 1
    assert not adapted(dense, merged)[5].any()
    assert to_numpy(merged.m)[5] == 0
    assert np.isfinite(to_numpy(merged.lora_b)).all()


def test_a_magnitude_that_all_reverse_stays_reversed() -> None:
    weight, dense = make_weight()
    inputs = [make_input(dense, 4, 1.0, 1)] * 2
    assert inputs[0].m is not None
    inputs[0].m[3] = -inputs[0].m[3]
    merged = merge(weight, inputs, "ties", density=1.0)
    assert to_numpy(merged.m)[3] < 0
    assert_close(adapted(dense, merged), adapted(dense, inputs[0]), bound=1e-6)


def test_dare_is_set_by_its_seed() -> None:
    weight, dense = make_weight()
    inputs = three(dense)
    first, again, other = (
        merge(weight, inputs, "dare", seed=seed) for seed in (3, 3, 4)
    )
    for name, value in first.tensors.items():
        assert mx.array_equal(again.tensors[name], value)
    assert not mx.array_equal(other.lora_a, first.lora_a)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_updates_beyond_float32_are_refused(value: float) -> None:
    weight, dense = make_weight()
    inputs = three(dense)
    inputs[0].update.lora_b[0, 3] = value
    with pytest.raises(DoRAError, match="not finite"):
        merge(weight, inputs, "ties")


def test_weights_by_row_and_a_missing_rank_are_refused() -> None:
    weight, dense = make_weight()
    inputs = three(dense)
    shares = np.ones((40, 3))
    shares[0, 0] = 2.0
    with pytest.raises(DoRAError, match="ties needs one weight per adapter"):
        merge_in_space(
            weight, inputs, shares, method="ties", space=SPACES["core"], scale=1.0,
            options=Options(),
        )  # fmt: skip
    with pytest.raises(DoRAError, match="space ctm needs the rank of the result"):
        SPACES["ctm"].check_rank(None)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("space", FACTORED)
def test_no_array_has_the_size_of_the_matrix(space: str, bits: int | None) -> None:
    rows = width = 2560  # several blocks of rows
    weight, dense = make_weight(rows, width, bits)
    inputs = [make_input(dense, 8, 1.0, seed) for seed in range(2)]
    merge(weight, inputs, "ties", space)  # allocates what libraries keep
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    try:
        merged = merge(weight, inputs, "ties", space)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert merged.rank <= 16
    matrix = 4 * rows * width  # float32
    assert peak < matrix / 2  # of NumPy
    assert mx.get_peak_memory() - before < matrix / 2
