"""SIGTERM and SIGHUP, and processes that start without streams or a TMPDIR."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_dora.cli._framework import verb
from mlx_dora.cli._group import group
from mlx_dora.io import checkpoint
from tests.cli.material import make_material
from tests.processes import Process
from tests.train.saved import log

ROOT = Path(__file__).parents[2]
CODES = {signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("stops") / "m", fisher=False)


WRITERS = {
    "fuse": "fuse --model @m0 --adapter-path @a1 --save-path OUT",
    "merge models": "merge models @m0 @m1 --save-path OUT",
    "merge fisher": "merge fisher --model @m0 --data @data --num-batches 1 "
    "--save-path OUT",
}


@pytest.mark.parametrize("number", list(CODES))
@pytest.mark.parametrize("name", list(WRITERS))
def test_a_stopped_command_cleans_up(
    name: str,
    number: signal.Signals,
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(checkpoint.ShardWriter, "add", stop)
    monkeypatch.setattr(checkpoint.ShardWriter, "add_blocks", stop)
    words = WRITERS[name].replace("@", f"{material}/").replace("OUT", f"{tmp_path}/o")
    before = signal.getsignal(number)
    result = CliRunner().invoke(group, words.split())
    assert result.exit_code == CODES[number], result.output
    assert result.stderr.splitlines()[-1] == f"Stopped by {number.name}."
    assert signal.getsignal(number) == before
    left = [path.suffix for path in tmp_path.iterdir()]
    # An interrupted merge of models is resumed by the next merge with the same input.
    assert left == ([".resume"] if name == "merge models" else [])


def test_an_ignored_signal_stays_ignored() -> None:
    @verb("patient")
    def command() -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as with nohup
    try:
        assert CliRunner().invoke(command, []).exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", list(CODES))
def test_a_stopped_training_saves_first(
    number: signal.Signals, material: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    words = (
        f"train --model {material}/m0 --data {material}/data --iters 100000 --rank 2 "
        f"--num-layers 1 --batch-size 1 --val-batches 0 --steps-per-report 1 "
        f"--adapter-path {folder}"
    )
    process = Process(["-m", "mlx_dora", *words.split()], stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == CODES[number], errors
    assert "finishing the step and saving" in errors
    assert errors.splitlines()[-1] == f"Stopped by {number.name}."
    last = log(folder)[-1]["step"]
    assert (folder / "checkpoints" / str(last) / "state.json").exists()
    assert (folder / "adapter_config.json").exists()


def run(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell line in which MLX_DORA stands for the command."""
    line = line.replace("MLX_DORA", f"'{sys.executable}' -m mlx_dora")
    return subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_closed_streams_and_a_missing_temporary_folder_do_not_matter(
    material: Path, tmp_path: Path
) -> None:
    line = (
        f"MLX_DORA train --model {material}/m0 --data {material}/data --iters 1 "
        f"--rank 2 --num-layers 1 --val-batches 0 --adapter-path {tmp_path}/a"
    )
    result = run(f"{line} <&- >&-", TMPDIR=f"{tmp_path}/none")
    assert result.returncode == 0, result.stderr
    assert f"TMPDIR '{tmp_path}/none' is not a folder" in result.stderr
    assert (tmp_path / "a" / "adapters.safetensors").exists()
    result = run(f"MLX_DORA analyze adapter {tmp_path}/a <&- >&- 2>&-")
    assert result.returncode == 0


def test_a_name_that_the_locale_cannot_write_is_refused_in_one_line(
    tmp_path: Path,
) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = run(f"MLX_DORA fuse --model '{tmp_path}/ä' --save-path o", **plain)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "set PYTHONUTF8=1" in result.stderr
    (tmp_path / "ö").mkdir()
    result = run(f"cd '{tmp_path}/ö'; MLX_DORA fuse --model m", **plain)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "set PYTHONUTF8=1" in result.stderr
