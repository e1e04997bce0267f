"""Merges of models that are killed, or that fill the disk."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_dora import DoRAError
from mlx_dora.cli.merge import command
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.merge import merge_models
from mlx_dora.merge.models.merge import run_merge
from mlx_dora.merge.models.plan import plan_models
from tests.processes import run


@pytest.fixture
def three(make_tiny_folder: Callable[..., Path]) -> list[Path]:
    return [make_tiny_folder(f"m{seed}", seed=seed) for seed in range(3)]


KILLED = """
import os, signal, sys
from mlx_dora.merge.models.merge import run_merge
from mlx_dora.merge.models.plan import plan_models

done = 0
def progress(what, total, number):
    global done
    done += number
    if done == 12:
        os.kill(os.getpid(), signal.SIGKILL)

a, b, out = sys.argv[1:]
run_merge(plan_models([a, b]), out, max_shard_bytes=20_000, progress=progress)
"""


def test_a_killed_merge_leaves_no_output_and_can_be_resumed(
    three: list[Path], tmp_path: Path
) -> None:
    a, b, _ = three
    out = tmp_path / "out"
    done = run(["-c", KILLED, a, b, out])
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert list(tmp_path.glob("*/model.safetensors")) == [
        folder / "model.safetensors" for folder in three
    ] or not list(tmp_path.glob("out*"))
    plan = plan_models([str(a), str(b)])
    report = run_merge(plan, out, max_shard_bytes=20_000)
    assert 0 < report.resumed < 12
    run_merge(plan, tmp_path / "whole", max_shard_bytes=20_000)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KILLED_AT_A_BLOCK = """
import os, signal, sys
from mlx_dora.io import stream
from mlx_dora.merge import merge_models

left, pwrite = int(sys.argv[4]), os.pwrite
def killing(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(*args)

stream.os.pwrite = killing
merge_models(sys.argv[1:3], save_path=sys.argv[3], dtype="bfloat16")
"""


def test_a_merge_killed_inside_a_shard_restarts_that_shard(
    three: list[Path], tmp_path: Path
) -> None:
    a, b, _ = three
    out = tmp_path / "out"
    for writes in ("1", "9"):
        done = run(["-c", KILLED_AT_A_BLOCK, a, b, out, writes])
        assert done.returncode == -signal.SIGKILL
        assert not out.exists()
        left = [path for path in tmp_path.glob(".*") if path.is_dir()]
        assert [path.suffix for path in left] == [".resume"]
        with pytest.raises(DoRAError):  # no shard, no index, no config: not readable
            Checkpoint(left[0])
    merge_models([a, b], save_path=out, dtype="bfloat16")
    merge_models([a, b], save_path=tmp_path / "whole", dtype="bfloat16")
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_ends_a_merge_with_one_line(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    out = str(tmp_path / "out")
    args = ["models", *map(str, three[:2]), "--save-path", out]
    result = CliRunner().invoke(command, args)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2"]


def test_other_settings_do_not_resume_the_leftovers(
    three: list[Path], tmp_path: Path
) -> None:
    a, b, _ = three
    out = tmp_path / "out"
    run(["-c", KILLED, a, b, out])
    report = merge_models([a, b], save_path=out, weights=[1, 2])
    assert report.resumed == 0
