"""The file in which choices are kept: damage, several processes, full disks."""

import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora.kernels import choice, kept, measure, trial
from mlx_dora.kernels.case import Case
from mlx_dora.kernels.measure import decide
from tests.kernels.device import Device, forget

NORM = Case("adapted_norm", mx.float32, 24, 32, 4)


def is_taken() -> bool:
    return choice.takes_kernel(NORM, measure.job_of)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 1, "devices": {"DEVICE": {"CASE": {"takes_kernel": 1}}}}',
        '{"version": 1, "devices": {"DEVICE": {"CASE": {}}}}',
        '{"version": 1, "devices": {"DEVICE": {"CASE": '
        '{"takes_kernel": true, "x": 1}}}}',
        '{"version": 1, "devices": {"DEVICE": {"CASE": '
        '{"takes_kernel": true, "problem": "wrong"}}}}',
        '{"version": 1, "devices": {"DEVICE": {"CASE": '
        '{"takes_kernel": true, "kernel_us": NaN}}}}',
        "\0\xff",
    ],
)
def test_a_damaged_file_is_said_once_and_measured_again(
    gpu: Device, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = damage.replace("DEVICE", choice.device_text()).replace("CASE", NORM.text)
    kept.kept_file().parent.mkdir(parents=True)
    kept.kept_file().write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "mlx_dora"):
        decide([NORM])
    assert len(gpu.timed) == 1
    assert is_taken()
    assert len(caplog.records) == 1
    assert "is damaged" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()
    forget()
    assert is_taken()  # the file was replaced


def test_a_file_of_another_version_is_ignored(
    gpu: Device, caplog: pytest.LogCaptureFixture
) -> None:
    kept.kept_file().parent.mkdir(parents=True)
    kept.kept_file().write_text('{"version": 2, "devices": []}')
    decide([NORM])
    assert is_taken()
    assert caplog.text == ""


def test_a_cache_that_cannot_be_made_costs_only_the_memory(
    gpu: Device, caplog: pytest.LogCaptureFixture
) -> None:
    kept.kept_file().parent.parent.mkdir(parents=True, exist_ok=True)
    kept.kept_file().parent.write_text("a file where the folder should be")
    decide([NORM])
    assert is_taken()
    assert caplog.text.count("kernel choices cannot be kept") == 1


def test_an_interrupted_write_leaves_the_old_file(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide([NORM])
    content = kept.kept_file().read_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            decide([NORM._replace(rows=48)])
    assert kept.kept_file().read_bytes() == content
    assert {p.name for p in kept.kept_file().parent.iterdir()} == {
        "kernels.json",
        "kernels.lock",
    }


def _add(folder: Path, number: int) -> None:
    kept.cache_folder = lambda: folder  # pyright: ignore[reportPrivateImportUsage]
    for round_ in range(5):
        with kept.locked():
            before = kept.read_kept("device")
            name = f"{number} {round_}"
            kept.keep("device", {**before, name: trial.Choice(takes_kernel=True)})


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_add, args=(tmp_path, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert len(content["devices"]["device"]) == 15


def test_the_file_lists_eight_devices_at_most(gpu: Device) -> None:
    right = trial.Choice(takes_kernel=True)
    for number in range(12):
        kept.keep(f"device {number}", {"case": right})
    kept.keep("device 5", {"other": right})
    devices = json.loads(kept.kept_file().read_text())["devices"]
    assert [*devices] == [f"device {n}" for n in (4, 6, 7, 8, 9, 10, 11, 5)]
    assert len(devices["device 5"]) == 2
