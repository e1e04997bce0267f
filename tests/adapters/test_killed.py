"""A process killed with no chance to clean up leaves no half-written output."""

import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import Adapter, load_adapter, save_adapter

# Writes the adapter again and again, and says each time that it starts.
LOOP = """
import sys
from pathlib import Path

from mlx_dora.adapters.files import load_adapter, save_adapter, write_adapter_files

source, target, way = sys.argv[1:]
adapter = load_adapter(source)
while True:
    print("start", flush=True)
    if way == "folder":
        save_adapter(adapter, target, overwrite=True)
    else:
        write_adapter_files(adapter, target)
"""


@pytest.mark.parametrize("way", ["folder", "live"])
@pytest.mark.parametrize("saves", [1, 3])
def test_kill_leaves_nothing_half_written(tmp_path: Path, way: str, saves: int) -> None:
    tensors = {
        f"m.{i}.{leaf}": mx.ones(shape)
        for i in range(8)
        for leaf, shape in (
            ("lora_a", (4096, 64)), ("lora_b", (64, 4096)), ("m", (4096,))
        )
    }  # fmt: skip
    config = DoRAConfig(rank=64, keys=tuple(f"m.{i}" for i in range(8)))
    source, target = tmp_path / "source", tmp_path / "out" / "target"
    save_adapter(Adapter(config=config, tensors=tensors), source)
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, source, target, way], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    for _ in range(saves):
        assert process.stdout.readline() == b"start\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    # Between its two renames, overwriting leaves the old folder whole in a hidden one.
    old = list(target.parent.glob(f".{target.name}.*.partial/old"))
    complete = [target] if target.exists() else old
    if way == "live":
        complete = [f for f in complete if (f / "adapter_config.json").exists()]
    if saves > 1:
        assert complete
    for folder in complete:
        assert load_adapter(folder).tensors.keys() == tensors.keys()
    # And the next save is not in the way of what was left.
    save_adapter(load_adapter(source), target, overwrite=True)
    assert load_adapter(target).tensors.keys() == tensors.keys()
