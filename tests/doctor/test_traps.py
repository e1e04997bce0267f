import dataclasses

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


def test_slow_products_on_a_cpu_come_with_the_cure() -> None:
    traps = find_traps(LINUX, MEMORY, MISSING, gflops=2.0, layers=[])
    assert "LD_PRELOAD=libopenblas.so.0" in traps[0]


def test_quick_products_are_no_trap_whatever_the_status_says() -> None:
    traps = find_traps(LINUX, MEMORY, MISSING, gflops=150.0, layers=[])
    assert not any("LD_PRELOAD" in trap for trap in traps)


def test_wrong_results_come_first() -> None:
    wrong = LayerCheck(name="float32", error=1.0, bound=1e-5, base_us=1, dora_us=1)
    traps = find_traps(LINUX, MEMORY, MISSING, gflops=2.0, layers=[wrong])
    assert traps[0].startswith("WRONG RESULTS")


def test_mac_traps_are_for_macs() -> None:
    mac = dataclasses.replace(LINUX, is_mac=True, is_gpu=True)
    memory = dataclasses.replace(MEMORY, wired_limit_mb=0)
    told = " ".join(find_traps(mac, memory, MISSING, gflops=2.0, layers=[]))
    assert "AGX_RELAX_CDM_CTXSTORE_TIMEOUT" in told
    assert "iogpu.wired_limit_mb" in told
    assert "LD_PRELOAD" not in told
