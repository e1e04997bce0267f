"""Disks that are full or not writable."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_dora.train.run.checkpoint import newest_checkpoint
from tests.train.killed import PLAIN, assert_same_run
from tests.train.saved import tensors

Run = Callable[..., Any]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system in memory, ``mounted("size=200k")``, or skip the test."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        program = shutil.which("mount")
        if program is None or os.name != "posix" or os.geteuid():
            pytest.skip("only root can mount a file system")
        command = [program, "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("this system does not allow mounting a tmpfs")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def fail(folder: Path, **settings: Any) -> str:
    process = PLAIN.start(folder, **settings)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    return errors.splitlines()[-1]


def test_a_full_disk_leaves_the_last_good_checkpoint(
    mounted: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    PLAIN.finish(whole, keep_last=1)
    size = sum(path.stat().st_size for path in (whole / "checkpoints/24").iterdir())
    folder = mounted(f"size={5 * size // 1024}k") / "adapter"
    message = fail(folder, keep_last=100)
    assert "disk is full" in message or "No space left on device" in message
    checkpoint = newest_checkpoint(folder, multiple_of=2)
    assert checkpoint is not None
    assert 0 < checkpoint.state.step < 24
    tensors(folder)
    shutil.copytree(folder, tmp_path / "adapter")
    PLAIN.finish(tmp_path / "adapter", resume=True)
    assert_same_run(whole, tmp_path / "adapter")


def test_a_limit_on_files_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "adapter"
    PLAIN.finish(whole)
    PLAIN.finish(folder, iters=8)
    limit = (folder / "checkpoints/8/optimizer.safetensors").stat().st_size - 1
    message = fail(folder, resume=True, largest_file=limit)
    assert message.startswith("OSError: ")
    assert "could not be written whole" in message
    assert str(folder / "checkpoints/12") in message
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"4", "8", ".lock"}
    PLAIN.finish(folder, resume=True)
    assert_same_run(whole, folder)


def test_an_unwritable_folder_is_refused_before_the_first_step(
    run: Run, mounted: Callable[[str], Path], tmp_path: Path
) -> None:
    place = tmp_path / "locked"
    place.mkdir(mode=0o500)
    if os.access(place, os.W_OK):  # root may write anywhere except on a read-only mount
        place = mounted("ro")
    steps: list[int] = []

    def count(phase: str, _total: int, new: int) -> None:
        steps.append(new)

    with pytest.raises(OSError, match=str(place)):
        run(str(place / "adapter"), progress=count)
    assert not steps
    assert not any(place.iterdir())
