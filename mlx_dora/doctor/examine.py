"""Every kernel checked and timed on this machine, beside plain MLX."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_dora.doctor.jobs import (
    Job,
    adapted_norm_job,
    dora_scale_job,
    fused_weight_job,
    normalize_rows_job,
)
from mlx_dora.kernels.choice import choices
from mlx_dora.kernels.dispatch import allowed_error, chosen_backend, device_backend
from mlx_dora.kernels.kept import Choices, kept_file
from mlx_dora.kernels.measure import decide, job_of
from mlx_dora.kernels.trial import Choice, check, judge

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_BITS = (2, 3, 4, 5, 6, 8)
_RANK = 8


@dataclass(frozen=True, kw_only=True)
class KernelCheck:
    """One kernel in one dtype against its reference on a small input.

    Attributes:
        name: Op and what of it.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        error: Relative RMS error; NaN if it did not run or is not right.
        bound: The error allowed.
        problem: What is wrong; None if the result is right.
        seconds: Duration of the first call, most of it compilation.
    """

    name: str
    dtype: str
    error: float
    bound: float
    problem: str | None = None
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        """Whether the error is within the bound; a NaN is not."""
        return self.error <= self.bound


@dataclass(frozen=True, kw_only=True)
class OpTiming:
    """Times of one op, as measured now.

    Attributes:
        name: Op and what of it.
        now: The measurement.
        takes_kernel: Whether ``auto`` takes the kernel: the choice that is kept.
        bytes_moved: Bytes that the kernel must move.
    """

    name: str
    now: Choice
    takes_kernel: bool
    bytes_moved: int

    @property
    def gbps(self) -> float:
        """Bytes that the kernel must move, over the kernel's time; 0 without one."""
        return self.bytes_moved / self.now.kernel_us / 1e3 if self.now.kernel_us else 0


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything about the kernels on this machine.

    Attributes:
        chosen: What ``MLX_DORA_KERNELS`` and the device lead to.
        device: What the device could run: ``metal`` or ``cuda``.
        checks: Every kernel in every dtype.
        sizes: What was timed, in words.
        copy_gbps: Reading and writing arrays that together exceed the caches.
        timings: One for each op.
        choices: All choices kept for this device, by case.
        kept_in: The file that holds them.
    """

    chosen: str
    device: str
    checks: list[KernelCheck]
    sizes: str
    copy_gbps: float
    timings: list[OpTiming]
    choices: Choices
    kept_in: str


def examine() -> Examination:
    """Check every kernel in every dtype and time every op on a GPU.

    A choice made here is kept, unless an earlier one is.
    """
    shape, dtype = (4096, 4096), mx.bfloat16
    tokens = shape[0] // 2
    checks = [_check(job) for job in _small_jobs()]
    jobs = list(_jobs(shape, tokens, dtype))
    decisions = decide(job.case for job in jobs)
    otherwise = decisions.kernels == "forced"
    return Examination(
        chosen=chosen_backend(),
        device=device_backend(),
        checks=checks,
        sizes=(
            f"weight {shape[0]} x {shape[1]}, {tokens} tokens, rank {_RANK}, "
            f"{jobs[0].case.dtype_name}"
        ),
        copy_gbps=_copy_gbps(),
        timings=[
            OpTiming(
                name=job.name,
                now=judge(job.case, job_of(job.case)),
                takes_kernel=decisions.taken.get(job.case.text, otherwise),
                bytes_moved=job.traffic.large,
            )
            for job in jobs
        ],
        choices=choices(),
        kept_in=str(kept_file()).replace(str(Path.home()), "~"),
    )


def _jobs(shape: tuple[int, int], tokens: int, dtype: mx.Dtype) -> Iterator[Job]:
    yield normalize_rows_job(shape, dtype)
    yield adapted_norm_job(shape, _RANK, dtype)
    yield adapted_norm_job(shape, _RANK, dtype, bits=4)
    yield fused_weight_job(shape, _RANK, dtype)
    yield dora_scale_job((tokens, shape[1]), _RANK, dtype)
    yield dora_scale_job((tokens, shape[1]), _RANK, dtype, backward=True)


def _small_jobs() -> Iterator[Job]:
    shape = (33, 384)
    for dtype in _DTYPES:
        yield normalize_rows_job(shape, dtype)
        yield adapted_norm_job(shape, _RANK, dtype)
        for bits in _BITS:
            yield adapted_norm_job(shape, _RANK, dtype, bits=bits)
        yield fused_weight_job(shape, _RANK, dtype)
        yield dora_scale_job((70, 133), _RANK, dtype, backward=True)


def _check(job: Job) -> KernelCheck:
    result = check(job.case, job_of(job.case))
    return KernelCheck(
        name=job.name,
        dtype=job.case.dtype_name,
        error=float("nan") if result.error is None else result.error,
        bound=allowed_error(job.case.dtype_name, device_backend()),
        problem=result.problem,
        seconds=result.first_seconds or 0.0,
    )


def _copy_gbps() -> float:
    """Return the bandwidth of a copy whose arrays together exceed every cache."""
    arrays = [mx.full((64 << 20,), n, dtype=mx.bfloat16) for n in range(4)]  # 512 MB
    mx.eval(arrays)
    times = []
    for _ in range(10):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval([mx.negative(array) for array in arrays])
        mx.synchronize()
        times.append((time.perf_counter() - start) / len(arrays))
    return 2 * arrays[0].nbytes / statistics.median(times) / 1e9
