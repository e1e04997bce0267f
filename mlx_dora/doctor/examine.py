"""Every kernel checked and timed on this machine, beside plain MLX."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_dora.doctor.jobs import (
    Job,
    adapted_norm_job,
    dora_scale_job,
    fused_weight_job,
    normalize_rows_job,
)
from mlx_dora.kernels.dispatch import (
    allowed_error,
    chosen_backend,
    device_backend,
    relative_error,
)

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_BITS = (2, 3, 4, 5, 6, 8)
_RANK = 8


@dataclass(frozen=True, kw_only=True)
class KernelCheck:
    """One kernel in one dtype against its reference on a small input.

    Attributes:
        name: Op and what of it.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        error: Relative RMS error; NaN if it did not run.
        bound: The error allowed.
        problem: What MLX said if it did not run.
    """

    name: str
    dtype: str
    error: float
    bound: float
    problem: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether the error is within the bound; a NaN is not."""
        return self.error <= self.bound


@dataclass(frozen=True, kw_only=True)
class OpTiming:
    """Milliseconds of one op; `kernel_ms` is None where no kernel runs."""

    name: str
    kernel_ms: float | None
    compiled_ms: float
    plain_ms: float
    bytes_moved: int

    @property
    def gbps(self) -> float:
        """Bytes that the kernel must move, over the kernel's time or the compiled's."""
        return self.bytes_moved / (self.kernel_ms or self.compiled_ms) / 1e6


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything about the kernels on this machine.

    Attributes:
        chosen: What ``MLX_DORA_KERNELS`` and the device lead to.
        device: What the device could run: ``metal``, ``cuda`` or ``reference``.
        checks: Empty where no kernel can run.
        sizes: What was timed, in words.
        copy_gbps: Reading and writing an array of the timed weight's size.
        timings: One for each op.
    """

    chosen: str
    device: str
    checks: list[KernelCheck]
    sizes: str
    copy_gbps: float
    timings: list[OpTiming]


def examine() -> Examination:
    """Check every kernel in every dtype and time every op; takes seconds."""
    device = device_backend()
    has_kernels = device != "reference"
    shape = (4096, 4096) if has_kernels else (1024, 2048)
    dtype = mx.bfloat16 if has_kernels else mx.float32
    tokens = shape[0] // 2
    return Examination(
        chosen=chosen_backend(),
        device=device,
        checks=[_check(job, device) for job in _small_jobs()] if has_kernels else [],
        sizes=(
            f"weight {shape[0]} x {shape[1]}, {tokens} tokens, rank {_RANK}, "
            f"{_name(dtype)}"
        ),
        copy_gbps=_copy_gbps(shape, dtype, has_kernels),
        timings=[_time(job, has_kernels) for job in _jobs(shape, tokens, dtype)],
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


def _check(job: Job, device: str) -> KernelCheck:
    dtype = _name(job.dtype)
    problem, error = None, float("nan")
    try:
        error = relative_error(
            _flat(job.kernel(*job.arrays)), _flat(job.reference(*job.arrays))
        )
    except (RuntimeError, ValueError) as refused:
        problem = str(refused).strip().splitlines()[0]
    return KernelCheck(
        name=job.name,
        dtype=dtype,
        error=error,
        bound=allowed_error(dtype, device),
        problem=problem,
    )


def _flat(results: Any) -> list[mx.array]:
    if isinstance(results, mx.array):
        return [results]
    return [array for result in results for array in _flat(result)]


def _time(job: Job, has_kernels: bool) -> OpTiming:
    def milliseconds(function: Callable[..., Any]) -> float:
        return _seconds(lambda: function(*job.arrays), has_kernels) * 1e3

    kernel_ms = None
    if has_kernels:
        try:
            kernel_ms = milliseconds(job.kernel)
        except (RuntimeError, ValueError):
            kernel_ms = None  # told by the checks
    return OpTiming(
        name=job.name,
        kernel_ms=kernel_ms,
        compiled_ms=milliseconds(mx.compile(job.reference)),
        plain_ms=milliseconds(job.reference),
        bytes_moved=job.traffic.large,
    )


def _copy_gbps(shape: tuple[int, int], dtype: mx.Dtype, is_gpu: bool) -> float:
    x = mx.ones(shape, dtype=dtype)
    mx.eval(x)
    return 2 * x.nbytes / _seconds(lambda: mx.negative(x), is_gpu) / 1e9


def _seconds(run: Callable[[], Any], is_gpu: bool) -> float:
    """Median over rounds of the time of a call; many calls a round on a GPU."""
    calls, rounds = (8, 10) if is_gpu else (1, 5)
    mx.eval(run())
    times = []
    for _ in range(rounds):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval([run() for _ in range(calls)])
        mx.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
