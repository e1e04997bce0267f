"""A fuse holds few tensors at a time, and leaves no model if it is killed."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import apply_dora
from mlx_dora.errors import DoRAError
from mlx_dora.fuse import stream
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.model import fuse_model
from mlx_dora.io.header import read_header
from tests.adapters.training import TOKENS, perturb
from tests.processes import Process

SHARD = 4 << 20
KEYS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj", "model.embed_tokens")


@pytest.fixture
def make_large(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[Path, Path]]:
    """Make a model of a few large tensors, with an adapter on the largest."""

    def make(vocabulary: int = 16384, **kw: object) -> tuple[Path, Path]:
        sizes = {"hidden_size": 512, "intermediate_size": 2048}
        base = make_tiny_folder(
            "base", vocab_size=vocabulary, num_hidden_layers=4, **sizes, **kw
        )
        model, _ = load(base, lazy=True)
        apply_dora(model, DoRAConfig(num_layers=4, keys=KEYS, rank=4))
        perturb(model, 0.002)
        save_adapter(model, tmp_path / "adapter")
        return base, tmp_path / "adapter"

    return make


def largest_tensor(*folders: Path) -> int:
    return max(
        info.nbytes
        for folder in folders
        for file in folder.glob("*.safetensors")
        for info in read_header(file).values()
    )


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("bfloat16", "requantize"), ("float32", "requantize"),
        ("4 bits", "lossless"), ("4 bits", "requantize"), ("4 bits", "dequantize"),
    ],
)  # fmt: skip
def test_peak_memory_is_four_tensors_and_a_shard(
    make_large: Callable[..., tuple[Path, Path]], tmp_path: Path, kind: str, mode: str
) -> None:
    dtype = mx.bfloat16 if kind == "bfloat16" else mx.float32
    base, adapter = make_large(dtype=dtype, bits=4 if kind == "4 bits" else None)
    out = tmp_path / "fused"
    config = FuseConfig(mode=mode)  # pyright: ignore[reportArgumentType]
    limit = mx.set_cache_limit(0)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    try:
        fuse_model(base, adapter, out, config=config, max_shard_bytes=SHARD)
        peak = mx.get_peak_memory() - before
    finally:
        mx.set_cache_limit(limit)
    largest = largest_tensor(base, out)
    assert peak <= 4 * largest + SHARD


FUSE = """
import sys
from mlx_dora.fuse.model import fuse_model
from mlx_dora.fuse import stream
from mlx_dora.fuse.config import FuseConfig
base, adapter, out = sys.argv[1:]
config = FuseConfig(mode="lossless")
print("start", flush=True)
fuse_model(base, adapter, out, config=config, overwrite=True, max_shard_bytes=1 << 19)
"""


def test_kill_leaves_no_folder_that_loads(
    make_large: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = make_large(vocabulary=320, bits=4)
    out = tmp_path / "out" / "fused"
    seen = set()
    for step in range(4):
        process = Process(["-c", FUSE, base, adapter, out])
        assert process.stdout is not None
        assert process.stdout.readline() == "start\n"
        # Kill it while it writes the first shards, later shards, or the config.
        deadline = time.monotonic() + 60
        want = (0, 1, 4, 8)[step]
        while time.monotonic() < deadline and process.poll() is None:
            parts = list(out.parent.glob(".fused.*.partial/new/*.safetensors"))
            if len(parts) >= want:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left = list(out.parent.glob(".fused.*.partial/new"))
        seen.update(len(list(folder.glob("*.safetensors"))) for folder in left)
        for folder in left:
            with pytest.raises(DoRAError):
                load(folder)
        if out.exists():  # the kill came too late: the model is complete
            assert load(out, out / "adapter")[0](TOKENS).shape[-1] == 320
    assert len(seen) > 1


def test_a_disk_without_room_is_refused_before_any_work(
    make_large: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, adapter = make_large(vocabulary=512)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    usage = type(shutil.disk_usage(tmp_path))(size, 0, size // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(stream, "_fuse_module", None)  # not called
    with pytest.raises(OSError, match="MB are needed") as caught:
        fuse_model(base, adapter, tmp_path / "fused")
    assert caught.value.filename == str(tmp_path / "fused")
    assert {p.name for p in tmp_path.iterdir()} == {base.name, adapter.name}
