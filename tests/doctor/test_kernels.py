import dataclasses

import pytest

from mlx_dora.doctor.examine import Examination, KernelCheck, OpTiming
from mlx_dora.doctor.kernels import kernel_rows, timing_rows
from mlx_dora.doctor.traps import find_traps
from tests.doctor.test_traps import LINUX, MEMORY, MISSING

ON_CPU = Examination(
    chosen="reference",
    device="reference",
    checks=[],
    sizes="weight 4096 x 4096",
    copy_gbps=100.0,
    timings=[
        OpTiming(
            name="adapted_norm",
            kernel_ms=None,
            compiled_ms=2.0,
            plain_ms=4.0,
            bytes_moved=50_000_000,
        )
    ],
)
RIGHT = KernelCheck(name="adapted_norm", dtype="float32", error=1e-7, bound=1e-4)
ON_MAC = dataclasses.replace(
    ON_CPU,
    chosen="metal",
    device="metal",
    checks=[
        RIGHT,
        dataclasses.replace(RIGHT, dtype="float16", error=0.5),
        dataclasses.replace(
            RIGHT, dtype="bfloat16", error=float("nan"), problem="no compiler"
        ),
    ],
    timings=[dataclasses.replace(ON_CPU.timings[0], kernel_ms=1.0)],
)


def test_an_op_whose_kernel_does_not_run_is_timed_without_it() -> None:
    assert timing_rows(ON_CPU) == [
        ("copy", "100 GB/s"),
        (
            "adapted_norm",
            "no kernel; compiled 2.00 ms (25 GB/s, 25% of copy); plain MLX 4.00 ms",
        ),
    ]


def test_a_gpu_report_lists_correctness_and_speed() -> None:
    assert kernel_rows(ON_MAC)[1] == (
        "adapted_norm",
        "float32 right, 1e-07; float16 WRONG, 5e-01; bfloat16 DOES NOT RUN",
    )
    assert timing_rows(ON_MAC)[1][1].startswith(
        "kernel 1.00 ms (50 GB/s, 50% of copy), 2.00 times as fast as compiled"
    )


def test_a_bad_kernel_is_a_trap() -> None:
    traps = find_traps(LINUX, MEMORY, MISSING, 100.0, [], ON_MAC.checks)
    assert traps[0].startswith("The adapted_norm kernel in float16 is WRONG here")
    assert "bfloat16 does not run here: no compiler" in traps[1]


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_a_check_over_its_bound_is_not_right(error: float) -> None:
    assert RIGHT.is_right
    assert not dataclasses.replace(RIGHT, error=error).is_right
