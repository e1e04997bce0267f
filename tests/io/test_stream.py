import errno
import functools
import os
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.io import checkpoint, stream
from mlx_dora.io.checkpoint import Checkpoint, ShardWriter
from mlx_dora.io.header import read_header
from mlx_dora.io.stored import StoredTensor
from mlx_dora.io.stream import TensorStream

VALUES = mx.arange(-30, 30).reshape(6, 10)
DTYPES = [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint8, mx.bool_]


def write(path: Path, tensors: dict[str, mx.array], step: int = 7) -> None:
    written = TensorStream(path)
    for name, tensor in tensors.items():
        written.begin(name, tensor.dtype, tensor.shape)
        flat = tensor.reshape(-1)
        for first in range(0, flat.size, step):
            written.write(flat[first : first + step])
    written.close()


def test_a_file_written_in_blocks_is_read_by_mlx_and_the_header_check(
    tmp_path: Path,
) -> None:
    tensors = {f"a.{dtype}": VALUES.astype(dtype) for dtype in DTYPES}
    tensors |= {"ä": mx.array(1.5), "none": mx.zeros((0, 4)), "t": VALUES.T}
    write(tmp_path / "x.safetensors", tensors)
    infos = read_header(tmp_path / "x.safetensors")
    assert list(infos) == list(tensors)
    loaded = mx.load(str(tmp_path / "x.safetensors"))
    assert isinstance(loaded, dict)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert mx.array_equal(loaded[name], tensor)


def test_a_tensor_must_be_written_completely_and_no_further(tmp_path: Path) -> None:
    short = TensorStream(tmp_path / "a")
    short.begin("a", mx.float32, (3,))
    short.write(mx.ones(2))
    with pytest.raises(RuntimeError, match="not written"):
        short.begin("b", mx.float32, (3,))
    with pytest.raises(RuntimeError, match="not written"):
        short.close()
    with pytest.raises(RuntimeError, match="more was written"):
        short.write(mx.ones(2))
    short.abandon()
    assert list(tmp_path.iterdir()) == []


def test_waiting_blocks_use_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_WAITING", 64)
    monkeypatch.setattr(stream, "_FLUSH", 100)
    written = TensorStream(tmp_path / "a")
    written.begin("a", mx.float32, (1000,))
    for first in range(0, 1000, 10):
        written.write(mx.arange(first, first + 10).astype(mx.float32))
        assert sum(size for size, _ in written._waiting) <= 64
    written.close()
    stored = StoredTensor(tmp_path / "a", read_header(tmp_path / "a")["a"])
    assert mx.array_equal(stored[:], mx.arange(1000).astype(mx.float32))


def test_a_full_header_starts_the_next_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = functools.partial(TensorStream, room=256)
    monkeypatch.setattr(checkpoint, "TensorStream", small)
    with ShardWriter(tmp_path) as writer:
        for i in range(7):
            writer.add(f"t{i}", mx.full((10,), i))
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) == 3
    reader = Checkpoint(tmp_path)
    assert [reader.tensor(name)[0].item() for name in reader.names] == list(range(7))


def test_a_full_disk_is_reported_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stream.os, "pwrite", full)
    with (
        pytest.raises(OSError, match=r"No space left on device.*partial"),
        ShardWriter(tmp_path) as writer,
    ):
        writer.add("a", mx.ones(10))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_slices_of_a_stored_tensor(tmp_path: Path, dtype: mx.Dtype) -> None:
    value = VALUES.astype(dtype)
    write(tmp_path / "model.safetensors", {"first": mx.ones(3), "a": value})
    stored = Checkpoint(tmp_path).stored("a")
    assert (stored.shape, stored.ndim, stored.size) == ((6, 10), 2, 60)
    for tensor, whole in (
        (stored, value),
        (stored.reshape(-1), value.reshape(-1)),
        (stored.reshape((-1, 5)), value.reshape(-1, 5)),
    ):
        assert tensor.shape == whole.shape
        for index in (slice(0, 4), slice(3, 99), slice(2, 2), slice(None)):
            assert tensor[index].dtype == dtype
            assert tensor[index].tolist() == whole[index].tolist()


def test_a_file_that_became_shorter_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": VALUES.astype(mx.float32)})
    stored = Checkpoint(tmp_path).stored("a")
    os.truncate(tmp_path / "model.safetensors", stored._info.end - 4)
    assert stored[:5].shape == (5, 10)
    with pytest.raises(DoRAError, match="became shorter"):
        stored[4:]
