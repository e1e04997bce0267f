import dataclasses
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dora.doctor import examine as examining
from mlx_dora.doctor import jobs
from mlx_dora.doctor.examine import Examination, KernelCheck, OpTiming
from mlx_dora.doctor.kernels import choice_rows, kernel_rows, timing_rows
from mlx_dora.doctor.of_model import measure_model, model_rows
from mlx_dora.doctor.traps import find_traps
from mlx_dora.kernels.trial import Choice
from tests.doctor.test_traps import LINUX, MEMORY, MISSING
from tests.kernels.device import pretended

RIGHT = KernelCheck(
    name="adapted_norm", dtype="float32", error=1e-7, bound=1e-4, seconds=2.31
)
NAN = float("nan")
FASTER = Choice(takes_kernel=True, kernel_us=1000.0, plain_us=4000.0, first_seconds=2.5)
TIMING = OpTiming(
    name="adapted_norm", now=FASTER, takes_kernel=True, bytes_moved=50_000_000
)
ON_MAC = Examination(
    chosen="metal",
    device="metal",
    checks=[
        RIGHT,
        dataclasses.replace(
            RIGHT, dtype="float16", error=NAN, problem="is wrong by 5.0e-01"
        ),
        dataclasses.replace(
            RIGHT, dtype="bfloat16", error=NAN, problem="does not run (no compiler)"
        ),
    ],
    sizes="weight 4096 x 4096",
    copy_gbps=100.0,
    timings=[TIMING],
    choices={
        "adapted_norm float16 2 x 3, rank 4": FASTER,
        "adapted_norm 4-bit float16 2 x 3, rank 4": Choice(takes_kernel=False),
        "dora_scale float16 2 x 3, rank 4": Choice(takes_kernel=False),
    },
    kept_in="/cache/kernels.json",
)


def test_a_gpu_report_lists_correctness_and_seconds() -> None:
    assert kernel_rows(ON_MAC)[1] == (
        "adapted_norm",
        "float32 right, 1e-07, 2.3 s; float16 WRONG, 2.3 s; bfloat16 DOES NOT RUN",
    )


def test_a_gpu_report_lists_times_and_what_is_used() -> None:
    copy, row = timing_rows(ON_MAC)
    assert copy == ("copy", "100 GB/s, 512 MB at a time")
    assert row[1] == (
        "kernel 1000 us (50 GB/s, 50% of copy), plain MLX 4000 us; the kernel is used; "
        "first call 2.5 s"
    )
    kept = dataclasses.replace(TIMING, takes_kernel=False)
    broken = dataclasses.replace(TIMING, now=Choice(takes_kernel=False, problem="x"))
    others = dataclasses.replace(ON_MAC, timings=[kept, broken])
    assert "plain MLX is used; first call" in timing_rows(others)[1][1]
    assert timing_rows(others)[2][1] == "no kernel; plain MLX is used"


def test_the_choices_are_counted_by_op() -> None:
    assert choice_rows(ON_MAC) == [
        ("adapted_norm", "the kernel for 1 of 2 measured kinds"),
        ("dora_scale", "the kernel for 0 of 1 measured kinds"),
        ("kept in", "/cache/kernels.json (delete it to measure again)"),
    ]


def test_doctor_measures_keeps_and_reports_on_a_pretended_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended(tmp_path / "cache", monkeypatch) as gpu:
        gpu.ratio = lambda name: 1.5 if name == "fused_weight" else 0.5
        gpu.broken = {"adapted_norm_packed"}
        monkeypatch.setattr(examining, "device_backend", lambda: "metal")
        monkeypatch.setattr(examining, "_copy_gbps", lambda: 10.0)
        monkeypatch.setattr(examining, "_jobs", lambda *_: small())
        found = examining.examine()
        assert [t.takes_kernel for t in found.timings] == [True, True, False, False]
        wrong = {check.name for check in found.checks if not check.is_right}
        assert wrong == {f"adapted_norm {bits}-bit" for bits in (2, 3, 4, 5, 6, 8)}
        assert len(found.choices) == 4
        assert all(check.seconds > 0 for check in found.checks)
        gpu.ratio = lambda _: 5.0
        again = examining.examine()
        assert [t.takes_kernel for t in again.timings] == [True, True, False, False]
        assert again.timings[0].now.kernel_us == pytest.approx(5000)
        assert again.choices == found.choices  # what is kept stays


def test_doctor_measures_the_shapes_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path
) -> None:
    assert model_rows(measure_model(tiny_model_folder, 2, 8)) == [
        ("none", "nothing is to be chosen on this device")
    ]
    with pretended(tmp_path / "cache", monkeypatch) as gpu:
        gpu.ratio = lambda name: 0.5 if name == "adapted_norm" else 2.0
        found = measure_model(tiny_model_folder, 2, 24)
        assert {text.partition(",")[0] for text in found} >= {
            "adapted_norm float32 32 x 32",
            "dora_scale and gradients float32 16 x 64",
            "dora_scale and gradients float32 32 x 64",
            "dora_scale float32 1 x 64",
        }
        rows = model_rows(found)
        assert rows[0][0] == "kernel"
        assert rows[0][1].endswith("rank 2: kernel 500 us, plain MLX 1000 us")
        assert rows[-1][0] == "plain MLX"
        timed = len(gpu.timed)
        measure_model(tiny_model_folder, 2, 24)
        assert len(gpu.timed) == timed
    broken = Choice(takes_kernel=False, problem="is wrong by 1")
    assert model_rows({"case": broken}) == [("plain MLX", "case: is wrong by 1")]


def small() -> list[jobs.Job]:
    return [
        jobs.normalize_rows_job((8, 12), mx.bfloat16),
        jobs.adapted_norm_job((8, 64), 2, mx.bfloat16),
        jobs.adapted_norm_job((8, 64), 2, mx.bfloat16, bits=4),
        jobs.fused_weight_job((8, 12), 2, mx.bfloat16),
    ]


def test_a_bad_kernel_is_a_trap() -> None:
    traps = find_traps(LINUX, MEMORY, MISSING, 100.0, [], ON_MAC.checks)
    assert traps[0].startswith(
        "The adapted_norm kernel in float16 is wrong by 5.0e-01 here"
    )
    assert "bfloat16 does not run (no compiler) here" in traps[1]


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_a_check_over_its_bound_is_not_right(error: float) -> None:
    assert RIGHT.is_right
    assert not dataclasses.replace(RIGHT, error=error).is_right
