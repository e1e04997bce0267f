"""Tensors and config of an adapter must come from the same save."""

import json
import signal
import time
from pathlib import Path
from subprocess import DEVNULL

import mlx.core as mx
import pytest

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter, write_adapter_files
from mlx_dora.errors import DoRAError
from mlx_dora.io.header import read_header_and_metadata
from tests.processes import Process, run

# Writes two adapters in turn; each holds its scale in its tensors.
WRITER = """
import sys
from tests.adapters.test_one_save import scaled
from mlx_dora.adapters.files import save_adapter, write_adapter_files

way, target = sys.argv[1:]
adapters = scaled(1.0), scaled(2.0)
while True:
    for adapter in adapters:
        if way == "folder":
            save_adapter(adapter, target, overwrite=True)
        else:
            write_adapter_files(adapter, target)
"""
KILLED = """
import os, signal, sys
from tests.adapters.test_one_save import scaled
from mlx_dora.adapters import files
from mlx_dora.adapters.files import write_adapter_files

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

files.write_text = kill
write_adapter_files(scaled(2.0), sys.argv[1])
"""
ROOT = Path(__file__).parents[2]


def scaled(scale: float) -> Adapter:
    """Return an adapter that holds its scale in every tensor."""
    shapes = {"lora_a": (8, 2), "lora_b": (2, 8), "m": (8,)}
    tensors = {f"l.{leaf}": mx.full(shape, scale) for leaf, shape in shapes.items()}
    config = DoRAConfig(rank=2, scale=scale, keys=("l",), num_layers=-1)
    return Adapter(config=config, tensors=tensors)


def scales(folder: Path) -> set[float]:
    """Return every scale in the config and tensors of an adapter folder."""
    adapter = load_adapter(folder)
    values = {float(v) for t in adapter.tensors.values() for v in (t.min(), t.max())}
    return {adapter.config.scale, *values}


@pytest.mark.parametrize("way", ["folder", "live"])
def test_a_reader_beside_a_writer_gets_one_save(tmp_path: Path, way: str) -> None:
    target = tmp_path / "a"
    write_adapter_files(scaled(1.0), target)
    writer = Process(["-c", WRITER, way, target], stdout=DEVNULL, stderr=DEVNULL)
    seen: set[float] = set()
    refused = 0
    try:
        end = time.monotonic() + 60  # for a machine under load; 300 reads take seconds
        for _ in range(300):
            try:
                read = scales(target)
            except DoRAError:  # the only allowed exception, which must be rare
                refused += 1
                continue
            assert len(read) == 1, read
            seen |= read
            if time.monotonic() > end:
                break
        while len(seen) < 2 and time.monotonic() < end:
            seen |= scales(target)
    finally:
        writer.kill()
        writer.wait()
    assert seen == {1.0, 2.0}
    assert refused <= 3


def test_a_kill_between_the_two_files_is_refused_in_one_line(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_adapter_files(scaled(1.0), target)
    done = run(["-c", KILLED, target])
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(DoRAError, match="mixes two saves") as info:
        load_adapter(target)
    assert "--resume" not in str(info.value)
    (target / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(DoRAError, match="resume the training in it"):
        load_adapter(target)
    write_adapter_files(scaled(2.0), target)
    assert scales(target) == {2.0}


@pytest.mark.parametrize("by", ["mlx-lm", "an older mlx_dora"])
def test_a_kill_over_an_adapter_without_an_id_leaves_no_mix(
    tmp_path: Path, by: str
) -> None:
    target = tmp_path / "a"
    write_adapter_files(scaled(1.0), target)
    forget_the_id(target, by)
    assert scales(target) == {1.0}
    run(["-c", KILLED, target])
    with pytest.raises(DoRAError, match=r"it has no adapter_config\.json"):
        load_adapter(target)


def forget_the_id(folder: Path, by: str) -> None:
    """Rewrite an adapter like a program that does not know ids."""
    tensors = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    del content["mlx_dora"]["save"]
    if by == "mlx-lm":
        del content["mlx_dora"]
    path.write_text(json.dumps(content))


def test_a_config_edited_by_hand_is_read(tmp_path: Path) -> None:
    save_adapter(scaled(1.0), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace('"scale": 1.0', '"scale": 3.0'))
    assert scales(tmp_path / "a") == {1.0, 3.0}


def test_both_files_carry_the_id_and_equal_saves_are_equal_files(
    tmp_path: Path,
) -> None:
    for name, scale in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        save_adapter(scaled(scale), tmp_path / name)
    ids = []
    for name in "abc":
        _, metadata = read_header_and_metadata(tmp_path / name / "adapters.safetensors")
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert metadata["mlx_dora_save"] == config["mlx_dora"]["save"]
        ids.append(config["mlx_dora"]["save"])
    assert ids[0] == ids[1] != ids[2]
    for file in ("adapters.safetensors", "adapter_config.json"):
        first, second = (tmp_path / name / file for name in "ab")
        assert first.read_bytes() == second.read_bytes()
