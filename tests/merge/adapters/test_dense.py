"""Element-wise merges of adapters: directions, magnitudes, then an SVD."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.layers import weight_of
from mlx_dora.merge import merge_adapters
from mlx_dora.merge.adapters.dense import Options, merge_apart
from mlx_dora.merge.adapters.factor import _truncate
from tests.checks import assert_close, to_numpy
from tests.merge.adapters.test_merge import dense_rows, train
from tests.merge.methods.test_elementwise import ties_truth

PATH = "model.layers.1.self_attn.q_proj"


def base_of(model: nn.Module, path: str) -> np.ndarray:
    weight = weight_of(dict(model.named_modules())[path])
    assert isinstance(weight, mx.array)
    return to_numpy(weight)


def split(model: nn.Module, adapter, path: str) -> tuple[np.ndarray, np.ndarray]:
    """W0 + sBA and m of a module, in float64."""
    base = base_of(model, path)
    a, b, m = (
        to_numpy(adapter.tensors[f"{path}.{leaf}"])
        for leaf in ("lora_a", "lora_b", "m")
    )
    return base + adapter.config.scale * (a @ b).T, m


def test_ties_elects_signs_of_directions_and_magnitudes_separately(
    tiny_model: nn.Module,
) -> None:
    adapters = [train(tiny_model, 1), train(tiny_model, 2, rank=5)]
    weights, density = [1.0, 0.5], 0.4
    merged = merge_adapters(
        adapters, model=tiny_model, method="ties", weights=weights, density=density,
        rank=32,
    )  # fmt: skip
    base = base_of(tiny_model, PATH)
    norm = np.linalg.norm(base, axis=1)
    parts = [split(tiny_model, adapter, PATH) for adapter in adapters]
    share = [density] * 2
    direction = base + ties_truth([v - base for v, _ in parts], weights, share, True)
    length = norm + ties_truth([m - norm for _, m in parts], weights, share, True)
    unit = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    assert_close(dense_rows(tiny_model, merged, PATH), length[:, None] * unit)


def test_a_conflict_of_lengths_does_not_affect_directions() -> None:
    base = mx.array(np.eye(2, 4, dtype=np.float32))
    moved = base + mx.array([[0, 0.5, 0, 0], [0, 0, 0.5, 0]])
    direction, magnitude = merge_apart(
        "ties",
        base,
        [moved, moved],
        [mx.array([1.5, 1.0]), mx.array([0.9, 1.0])],
        [1.0, 1.0],
        Options(density=1.0),
    )
    assert_close(direction, to_numpy(moved))
    assert_close(magnitude, np.array([1.5, 1.0]))  # +.5 outvotes -.1


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "tsv"])
def test_a_cut_keeps_the_magnitudes_and_reports_the_loss(
    tiny_model: nn.Module, method: str
) -> None:
    adapters = [train(tiny_model, 1), train(tiny_model, 2, rank=5)]
    full, cut = (
        merge_adapters(adapters, model=tiny_model, method=method, rank=rank)
        for rank in (32, 4)
    )
    name = f"{PATH}.m"
    assert_close(cut.tensors[name], to_numpy(full.tensors[name]), bound=1e-7)
    a, b = (to_numpy(full.tensors[f"{PATH}.{leaf}"]) for leaf in ("lora_a", "lora_b"))
    sizes = np.linalg.svd(a @ b, compute_uv=False)
    assert sizes[4:].max() > 1e-6
    assert cut.config.rank == 4


def test_a_change_that_is_not_finite_is_refused_before_its_svd() -> None:
    change = np.ones((4, 3))
    change[1, 2] = np.inf
    with pytest.raises(DoRAError, match="not finite"):
        _truncate(change, 2, None)
