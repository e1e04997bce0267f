"""A process that is killed without cleanup leaves no partial output."""

import signal
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import Adapter, load_adapter, save_adapter
from tests.processes import Process

# Writes the adapter repeatedly and prints a line at each start.
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
def test_kill_leaves_no_partial_output(tmp_path: Path, way: str, saves: int) -> None:
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
    process = Process(["-c", LOOP, source, target, way])
    assert process.stdout is not None
    for _ in range(saves):
        assert process.stdout.readline() == "start\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    # Between the two renames of an overwrite, the old folder is in a hidden folder.
    old = list(target.parent.glob(f".{target.name}.*.partial/old"))
    complete = [target] if target.exists() else old
    if way == "live":
        complete = [f for f in complete if (f / "adapter_config.json").exists()]
    if saves > 1:
        assert complete
    for folder in complete:
        assert load_adapter(folder).tensors.keys() == tensors.keys()
    # The leftovers do not prevent the next save.
    save_adapter(load_adapter(source), target, overwrite=True)
    assert load_adapter(target).tensors.keys() == tensors.keys()
