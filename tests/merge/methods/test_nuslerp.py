"""nuslerp against mergekit's definition in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import DoRAError
from mlx_dora.merge.adapters.factored import merge_matrix
from mlx_dora.merge.methods.rows import Rows, nuslerp
from mlx_dora.merge.models import read_mergekit, run_merge
from tests.checks import assert_close
from tests.merge.matrices import adapted, make_input, make_weight
from tests.merge.models.test_merge import MATRIX, NORM, edit, read


def dense_nuslerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """The formula of mergekit/merge_methods/nuslerp.py, along the last axis."""
    a, b = a.astype(float), b.astype(float)
    unit_a, unit_b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    theta = np.arccos(np.clip((unit_a * unit_b).sum(-1, keepdims=True), -1, 1))
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("settings", [{}, {"nuslerp_flatten": False}])
def test_models_are_merged_as_mergekit_does(
    make_tiny_folder: Callable[..., Path],
    tmp_path: Path,
    settings: dict[str, Any],
    with_base: bool,
) -> None:
    base, *pair = (make_tiny_folder(f"m{seed}", seed=seed) for seed in range(3))
    for i, folder in enumerate(pair):
        edit(folder, **{NORM.replace(".", "__"): mx.arange(32.0) * (i + 1) + i})
    entries = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(pair, (0.3, 0.9), strict=True)
    ]
    config: dict[str, Any] = {
        "merge_method": "nuslerp",
        "models": entries,
        "parameters": settings,
    }
    if with_base:
        config["base_model"] = str(base)
        config["models"] = [{"model": str(base)}, *entries]
    run_merge(read_mergekit(config), tmp_path / "out")
    for name in (MATRIX, NORM):
        start = read(base, name) if with_base else 0.0
        a, b = (read(folder, name) - start for folder in pair)
        shape = a.shape if settings else (-1,)
        truth = dense_nuslerp(a.reshape(shape), b.reshape(shape), 0.75)
        truth = truth.reshape(a.shape) + start
        assert_close(mx.array(read(tmp_path / "out", name)), truth)


@pytest.mark.parametrize("bits", [None, 4])
def test_adapters_are_merged_exactly(bits: int | None) -> None:
    weight, dense = make_weight(bits=bits)
    inputs = [make_input(dense, 4, 2.0, 1), make_input(dense, 16, 0.5, 2)]
    shares = np.tile([0.25, 0.75], (40, 1))
    merged = merge_matrix(weight, inputs, shares, method="nuslerp", scale=3.0)
    first, second = (adapted(dense, adapted_input) for adapted_input in inputs)
    truth = dense_nuslerp(first, second, 0.75)
    assert_close(adapted(dense, merged), truth)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_parallel_and_opposed_rows_are_interpolated_on_a_line(sign: float) -> None:
    inner = np.array([[[4.0, sign * 6.0], [sign * 6.0, 9.0]]])
    rows = Rows(
        inner=inner, magnitude=np.array([[2.0, 3.0]]), weights=np.array([[0.25, 0.75]])
    )
    assert np.allclose(nuslerp(rows).coefficients, [[0.25, 0.75]])


def test_column_merges_and_wrong_model_counts_are_refused() -> None:
    entries = [{"model": name, "parameters": {"weight": 1}} for name in "abc"]
    config: dict[str, Any] = {"merge_method": "nuslerp", "models": entries[:2]}
    for parameters, message in (
        ({"nuslerp_row_wise": True}, "nuslerp_row_wise must be False, got True"),
        ({"nuslerp_flatten": 0.5}, "nuslerp_flatten must be true or false"),
    ):
        with pytest.raises(DoRAError, match=message):
            read_mergekit({**config, "parameters": parameters})
    with pytest.raises(DoRAError, match="nuslerp merges 2 inputs, got 3"):
        read_mergekit({**config, "models": entries})
