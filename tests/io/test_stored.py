"""Tensors that are read from their file in parts."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.io import stored
from mlx_dora.io.header import read_header
from mlx_dora.io.stored import StoredTensor


def write(path: Path, **tensors: mx.array) -> dict[str, StoredTensor]:
    mx.save_safetensors(str(path), tensors)
    infos = read_header(path)
    return {name: StoredTensor(path, infos[name], name) for name in tensors}


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("count", [1, 5, 256])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32, mx.uint8])
def test_spaced_elements_are_those_of_the_array(
    tmp_path: Path, step: int, count: int, dtype: mx.Dtype
) -> None:
    value = mx.arange(17 * 31).reshape(17, 31).astype(dtype)
    tensor = write(tmp_path / "a.safetensors", x=mx.zeros(3), y=value)["y"]
    expected = mx.contiguous(value.reshape(-1)[::step][:count]).view(mx.uint8)
    assert tensor.every(step, count) == np.array(expected).tobytes()


def test_a_file_cut_off_meanwhile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensor = write(path, y=mx.ones((64, 64)))["y"]
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DoRAError, match="became shorter"):
        tensor.every(100, 256)


@pytest.mark.parametrize("size", [1, 99, 100, 101, 1000])
def test_equal_bytes(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_COMPARED", 100)
    value = mx.arange(size).astype(mx.uint8)
    made = write(
        tmp_path / "a.safetensors",
        first=value,
        same=mx.array(value),
        last=mx.concatenate([value[:-1], value[-1:] + 1]),
        longer=mx.concatenate([value, value[:1]]),
    )
    first = made["first"]
    assert first.holds_same_bytes(made["same"])
    assert not first.holds_same_bytes(made["last"])
    assert not first.holds_same_bytes(made["longer"])
