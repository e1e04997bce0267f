"""Pico before merges of adapters: sizes restored, magnitudes kept."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.matrix import Adapted
from mlx_dora.merge import merge_adapters
from mlx_dora.merge.adapters.calibrate import calibrated, restored
from mlx_dora.merge.adapters.factored import merge_matrix
from mlx_dora.merge.methods import METHODS
from mlx_dora.merge.methods.calibrations import CALIBRATIONS
from tests.checks import assert_close, to_numpy
from tests.merge.adapters.test_in_space import merge, parts_of, three
from tests.merge.adapters.test_laws import assert_same, settings, weighed
from tests.merge.adapters.test_merge import train
from tests.merge.matrices import make_weight
from tests.merge.names import ALL, CHOOSING, most

PICO = CALIBRATIONS["pico"]


def operator(inputs: list[Adapted]) -> np.ndarray:
    """S of the paper, on the whole output space, float64."""
    b = np.hstack([i.update.scale * to_numpy(i.update.lora_b).T for i in inputs])
    u, sizes, _ = np.linalg.svd(b)
    energy = np.zeros(len(u))
    energy[: len(sizes)] = sizes**2 / (sizes**2).sum()
    return (u * (1 / (1 + (len(inputs) - 1) * energy))) @ u.T


def test_pico_with_a_sum_of_lora_is_the_papers_merge() -> None:
    """With own lengths: W0 + γ Σ S·ΔW, and nothing of DoRA."""
    weight, dense = make_weight()
    inputs = [replace(one, m=None) for one in three(dense)]
    shares = np.ones((40, 3))
    ready = calibrated(weight, inputs, shares, PICO)
    merged = merge(weight, ready, "task_arithmetic", magnitudes="own")
    result = restored(merged, inputs, shares, 1.0)
    updates = [parts_of(dense, one)[0] for one in inputs]
    change = operator(inputs) @ np.sum(updates, axis=0)
    size = np.mean([np.linalg.norm(update) for update in updates])
    update = 3.0 * (to_numpy(result.lora_a) @ to_numpy(result.lora_b)).T
    assert_close(update, size / np.linalg.norm(change) * change, bound=1e-6)


def test_magnitudes_are_those_before_the_calibration() -> None:
    weight, dense = make_weight()
    inputs = three(dense)  # the second is LoRA
    ready = calibrated(weight, inputs, np.ones((40, 3)), PICO)
    for before, after in zip(inputs, ready, strict=True):
        assert after.m is not None
        assert_close(after.m, parts_of(dense, before)[1], bound=1e-6)
        assert_close(
            parts_of(dense, after)[0],
            operator(inputs) @ parts_of(dense, before)[0],
            bound=1e-6,
        )


def test_adapters_without_weight_or_update_do_not_take_part() -> None:
    weight, dense = make_weight()
    first, second, third = three(dense)
    zero = replace(third.update, lora_b=mx.zeros_like(third.update.lora_b))
    inputs = [first, second, Adapted(update=zero, m=None)]
    ready = calibrated(weight, inputs, np.ones((40, 3)), PICO)
    pair = calibrated(weight, inputs[:2], np.ones((40, 2)), PICO)
    for one, other in zip(ready[:2], pair, strict=True):
        assert mx.array_equal(one.update.lora_b, other.update.lora_b)
    assert ready[2] is inputs[2]
    alone = calibrated(weight, inputs, np.tile([1.0, 0.0, 1.0], (40, 1)), PICO)
    assert [one is other for one, other in zip(alone, inputs, strict=True)] == [
        True
    ] * 3


def test_the_merged_update_has_the_mean_size_times_lambda() -> None:
    weight, dense = make_weight()
    inputs = three(dense)
    shares = np.full((40, 3), 1 / 3)
    ready = calibrated(weight, inputs, shares, PICO)
    merged = merge_matrix(weight, ready, shares, method="nmean", scale=2.0)
    sizes = [np.linalg.norm(parts_of(dense, one)[0]) for one in inputs]
    for factor in (1.0, 0.5):
        result = restored(merged, inputs, shares, factor)
        update = 2.0 * to_numpy(result.lora_a) @ to_numpy(result.lora_b)
        assert np.linalg.norm(update) == pytest.approx(
            factor * np.mean(sizes), rel=1e-5
        )
        assert result.m is merged.m


@pytest.mark.parametrize("method", [m for m in ALL if m not in CHOOSING])
def test_one_adapter_comes_back(tiny_model: nn.Module, method: str) -> None:
    """T = 1 calibrates nothing, so each method gives what it gives without."""
    if METHODS[method].inputs[0] > 1:
        pytest.skip("merges at least two")
    first = train(tiny_model, 1)
    kw = {**settings(method, tiny_model, [first]), "rank": 32}
    plain, result = (
        merge_adapters([first], calibrate=calibrate, **kw)
        for calibrate in (None, "pico")
    )
    assert_same(tiny_model, result, plain, 1e-5)


@pytest.mark.parametrize("method", [m for m in ALL if m != "fisher"])
def test_the_order_of_the_adapters_does_not_matter(
    tiny_model: nn.Module, method: str
) -> None:
    count = most(method, 3)
    if count < 2 or "seed" in METHODS[method].parameters:
        pytest.skip("one adapter, or random")
    adapters = [train(tiny_model, i, rank=2 + i) for i in range(count)]
    weights = [0.2, 0.3, 0.5][:count]
    kw: dict[str, Any] = {**settings(method, tiny_model, adapters), "rank": 32}
    kw["calibrate"] = "pico"
    first = merge_adapters(adapters, **kw, **weighed(method, weights))
    other = merge_adapters(adapters[::-1], **kw, **weighed(method, weights[::-1]))
    assert_same(tiny_model, first, other, 1e-5)


def test_updates_beyond_float32_are_refused() -> None:
    weight, dense = make_weight()
    inputs = three(dense)
    inputs[1].update.lora_a[0, 0] = float("nan")
    with pytest.raises(DoRAError, match="not finite"):
        calibrated(weight, inputs, np.ones((40, 3)), PICO)
