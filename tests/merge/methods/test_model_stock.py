"""Model Stock against the formula of its paper and of mergekit, in float64."""

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import DoRAError
from mlx_dora.matrix import Adapted
from mlx_dora.merge import merge_models
from mlx_dora.merge.adapters.factored import merge_matrix
from mlx_dora.merge.methods.rows import Rows, model_stock
from mlx_dora.merge.models import read_mergekit, run_merge
from tests.checks import assert_close
from tests.merge.matrices import adapted, make_input, make_weight
from tests.merge.models.test_merge import MATRIX, NORM, edit, read
from tests.merge.oracle import total


def dense_model_stock(base: np.ndarray, tuned: Sequence[np.ndarray]) -> np.ndarray:
    """The formula of mergekit/merge_methods/model_stock.py, along the last axis."""
    base = base.astype(float)
    moved = [array - base for array in tuned]
    cosines = [
        (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
        for a, b in combinations(moved, 2)
    ]
    cosine, count = np.mean(cosines, axis=0)[..., None], len(tuned)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * total(tuned) / count + (1 - t) * base


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"filter_wise": True}])
def test_models_are_merged_as_mergekit_does(
    make_tiny_folder: Callable[..., Path],
    tmp_path: Path,
    settings: dict[str, Any],
    count: int,
) -> None:
    folders = [make_tiny_folder(f"m{seed}", seed=seed) for seed in range(count + 1)]
    for i, folder in enumerate(folders):
        value = mx.random.normal((32,), key=mx.random.key(i))
        edit(folder, **{NORM.replace(".", "__"): 1 + 0.1 * value})
    config = {
        "merge_method": "model_stock",
        "base_model": str(folders[0]),
        "models": [{"model": str(folder)} for folder in folders],
        "parameters": settings,
    }
    run_merge(read_mergekit(config), tmp_path / "out")
    for name in (MATRIX, NORM):
        base, *tuned = (read(folder, name) for folder in folders)
        shape = base.shape if settings else (-1,)
        truth = dense_model_stock(
            base.reshape(shape), [array.reshape(shape) for array in tuned]
        )
        result = read(tmp_path / "out", name)
        assert_close(mx.array(result), truth.reshape(base.shape))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("size", [0.1, 1e-4])
def test_adapters_are_merged_exactly(bits: int | None, size: float) -> None:
    """Includes small changes, whose inner products are far below those of the rows."""
    weight, dense = make_weight(bits=bits)
    inputs = [make_input(dense, 2 + i, 1.0, i, size=size) for i in range(3)]
    if size < 1e-3:
        inputs = [
            Adapted(update=adapted_input.update, m=None) for adapted_input in inputs
        ]
    shares = np.ones((40, 3))
    merged = merge_matrix(weight, inputs, shares, method="model_stock", scale=3.0)
    parts = [adapted(dense, adapted_input) for adapted_input in inputs]
    truth = dense_model_stock(dense, parts)
    assert_close(adapted(dense, merged), truth)
    if size > 1e-3:
        assert_close(adapted(dense, merged) - dense, truth - dense, bound=1e-4)


def test_where_the_angles_cancel_the_base_is_kept_and_counted() -> None:
    opposed = np.array([[[1.0, -1.0], [-1.0, 1.0]]])  # 1 + (2 - 1) cos = 0
    rows = Rows(inner=opposed, magnitude=np.ones((1, 2)), weights=np.ones((1, 2)))
    result = model_stock(rows)
    assert (result.coefficients == 0).all()
    assert result.opposed.tolist() == [True]


def test_weights_a_missing_base_and_a_single_model_are_refused(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base, first, two = (make_tiny_folder(f"m{seed}", seed=seed) for seed in range(3))
    kw: dict[str, Any] = {"method": "model_stock", "save_path": tmp_path / "out"}
    cases: tuple[tuple[list[Path], dict[str, Any], str], ...] = (
        ([first, two], {"base": base, "weights": [1, 2]}, "uses no weights"),
        ([first, two], {}, "model_stock needs a base"),
        ([first], {"base": base}, "model_stock merges at least 2 inputs, got 1"),
    )
    for models, more, message in cases:
        with pytest.raises(DoRAError, match=message):
            merge_models(models, **kw, **more)
