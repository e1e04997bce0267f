import dataclasses

import pytest

from mlx_dora.doctor import machine as machine_module
from mlx_dora.doctor.checks import LayerCheck
from mlx_dora.doctor.machine import Machine, Memory
from mlx_dora.doctor.traps import find_traps
from mlx_dora.openblas import OpenBLASStatus

LINUX = Machine(
    device="CPU",
    chip="chip",
    cores=2,
    system="Linux",
    python="3.12",
    is_gpu=False,
    is_mac=False,
)
MEMORY = Memory(
    total_bytes=2**34,
    recommended_bytes=None,
    largest_buffer_bytes=None,
    mlx_limit_bytes=2**34,
    wired_limit_mb=None,
)
MISSING = OpenBLASStatus(state="missing", message="It is not installed.")


def test_slow_products_on_a_cpu_come_with_the_remedy() -> None:
    traps = find_traps(LINUX, MEMORY, MISSING, gflops=2.0, layers=[])
    assert "LD_PRELOAD=libopenblas.so.0" in traps[0]


def test_fast_products_are_not_a_trap_whatever_the_status_is() -> None:
    traps = find_traps(LINUX, MEMORY, MISSING, gflops=150.0, layers=[])
    assert not any("LD_PRELOAD" in trap for trap in traps)


def test_wrong_results_come_first() -> None:
    wrong = LayerCheck(name="float32", error=1.0, bound=1e-5, base_us=1, dora_us=1)
    traps = find_traps(LINUX, MEMORY, MISSING, gflops=2.0, layers=[wrong])
    assert traps[0].startswith("WRONG RESULTS")


def test_mac_traps_are_for_macs() -> None:
    mac = dataclasses.replace(LINUX, is_mac=True, is_gpu=True)
    memory = dataclasses.replace(MEMORY, wired_limit_mb=0)
    warnings = " ".join(find_traps(mac, memory, MISSING, gflops=2.0, layers=[]))
    assert "AGX_RELAX_CDM_CTXSTORE_TIMEOUT" in warnings
    assert "iogpu.wired_limit_mb" in warnings
    assert "--clear-cache-threshold" in warnings
    assert "This Mac sleeps when idle" in warnings
    assert "LD_PRELOAD" not in warnings


def test_a_mac_that_never_sleeps_needs_no_caffeine() -> None:
    mac = dataclasses.replace(LINUX, is_mac=True, is_gpu=True)

    def warnings_for(minutes: int) -> str:
        memory = dataclasses.replace(MEMORY, sleep_minutes=minutes)
        return " ".join(find_traps(mac, memory, MISSING, gflops=2.0, layers=[]))

    assert "caffeinate" not in warnings_for(0)
    assert "sleeps after 10 idle minutes" in warnings_for(10)


def test_the_sleep_setting_is_read_from_pmset(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " standby              1\n sleep                10 (sleep prevented by x)\n"
    monkeypatch.setattr(machine_module, "_ask_mac", lambda *command: text)
    assert machine_module._sleep_minutes() == 10
    monkeypatch.setattr(machine_module, "_ask_mac", lambda *command: "")
    assert machine_module._sleep_minutes() is None
