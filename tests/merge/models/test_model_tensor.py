"""Merges one tensor of several models: from files, and with NaN or inf."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import DoRAError
from mlx_dora.io.checkpoint import Checkpoint, ShardWriter
from mlx_dora.merge import merge_models
from mlx_dora.merge.methods import METHODS, blockwise
from mlx_dora.merge.methods.settings import TensorSettings
from mlx_dora.merge.models.tensor import merge_tensor
from tests.merge.names import ALL, most, needed

CASES = [
    (method, granularity)
    for method in ALL
    for granularity in ("row", "tensor")
    if method != "fisher" and (method, granularity) != ("magnitude_weighted", "tensor")
]


@pytest.mark.parametrize(("method", "granularity"), CASES)
def test_no_method_hides_nan_or_inf(
    tmp_path: Path, method: str, granularity: str
) -> None:
    """A bad entry in the base or a model, in a matrix or vector, masked or not."""
    rng = np.random.default_rng(1)
    shapes = {"a.weight": (6, 7), "norm.weight": (8,)}
    names = ("base", "one", "two")[: 1 + most(method, 2)]
    folders = [tmp_path / name for name in names]
    parameters: dict[str, Any] = {"granularity": granularity}
    parameters |= needed(method, epsilon=0.02)
    if METHODS[method].density is not None:
        parameters["density"] = 0.05
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
    for bad, name, value in itertools.product(
        folders, shapes, (np.nan, np.inf, -np.inf)
    ):
        for folder in folders:
            values = {
                name: rng.standard_normal(shape) for name, shape in shapes.items()
            }
            if folder == bad:
                values[name].flat[5] = value
            tensors = {
                name: mx.array(v.astype(np.float32)) for name, v in values.items()
            }
            mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        base, *tuned = folders
        with pytest.raises(DoRAError, match=f"{bad}: {name} holds NaN or inf"):
            merge_models(
                tuned, base=base, method=method, save_path=tmp_path / "out",
                parameters=parameters,
            )  # fmt: skip


def test_float16_overflow_is_refused(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tiny_folder()
    path = str(folder / "model.safetensors")
    tensors = mx.load(path)
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    tensors["model.norm.weight"] = mx.full((32,), 1e5)
    mx.save_safetensors(path, tensors)
    kw: dict[str, Any] = {"method": "linear", "save_path": tmp_path / "out"}
    with pytest.raises(DoRAError, match=r"norm.weight.*too large for mlx.core.float16"):
        merge_models([folder, folder], dtype="float16", **kw)
    merge_models([folder, folder], dtype="bfloat16", **kw)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("method", "granularity"), CASES)
def test_files_and_arrays_merge_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method, granularity, dtype
) -> None:
    monkeypatch.setattr(blockwise, "BLOCK", 500)
    mx.random.seed(2)
    arrays = {name: mx.random.normal((40, 33)).astype(dtype) for name in "abc"}
    with ShardWriter(tmp_path) as writer:
        for name, value in arrays.items():
            writer.add(name, value)
    files = [Checkpoint(tmp_path).stored(name) for name in arrays]
    count = most(method, 2)
    given = needed(method, epsilon=0.1, select_topk=0.3)
    settings = TensorSettings(
        weights=np.array([0.4, 0.6][:count]),
        density=(0.3, 0.5)[:count],
        own=METHODS[method].own_values(count, lambda name, _: given.get(name)),
        as_mergekit=granularity == "tensor",
    )
    base, *held = list(arrays.values())[: count + 1]
    base_file, *stored = files[: count + 1]
    expected, _ = merge_tensor(method, base, held, settings, granularity)
    result, _ = merge_tensor(method, base_file, stored, settings, granularity)
    assert mx.array_equal(result, expected)
