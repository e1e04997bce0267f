"""A kernel and plain MLX on the same inputs: compared, then timed."""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.kernels.case import Case
from mlx_dora.kernels.dispatch import (
    allowed_error,
    device_backend,
    relative_error,
)

logger = logging.getLogger(__name__)

MARGIN = 0.02
"""Share of plain MLX's time that a kernel must save to be taken."""

# Larger than the last-level cache of any chip known to us: 96 MB (M3 Ultra), 50 MB
# (H100, H200), 126 MB (B200).
_FRESH_BYTES = 256 << 20
_MAX_SETS = 256
_ROUND_SECONDS = 1e-3
_ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Job:
    """One case as two functions of the same inputs.

    Attributes:
        inputs: Returns the arguments, made from a seed.
        kernel: Runs the kernel.
        plain: Runs plain MLX as the package runs it for such a case.
        linked: Place of a float32 argument that each call derives from the result of
            the call before, so that calls run one after another as layers do: MLX's
            CUDA build runs independent kernels side by side. None for ops whose calls
            are independent in a step too.
        is_compiled: Whether the package runs such a case inside `mx.compile`.
    """

    inputs: Callable[[int], tuple[mx.array, ...]]
    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    linked: int | None = None
    is_compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was measured for a case, and what is taken.

    Attributes:
        takes_kernel: Whether ``auto`` uses the kernel.
        kernel_us: Microseconds of a call by the kernel; None if not timed.
        plain_us: Microseconds of a call by plain MLX; None if not timed.
        first_seconds: Duration of the first call, which compiles the kernel.
        error: Relative RMS error of the kernel against plain MLX.
        problem: Why the kernel cannot be used; None if its results are right.
    """

    takes_kernel: bool
    kernel_us: float | None = None
    plain_us: float | None = None
    first_seconds: float | None = None
    error: float | None = None
    problem: str | None = None


def judge(case: Case, job: Job) -> Choice:
    """Compile, compare and time a kernel for a case; the faster side is taken."""
    checked = check(case, job)
    if checked.problem is not None:
        return checked
    kernel, plain = rounds(job)
    return Choice(
        takes_kernel=is_faster(kernel, plain),
        kernel_us=1e6 * statistics.median(kernel),
        plain_us=1e6 * statistics.median(plain),
        first_seconds=checked.first_seconds,
        error=checked.error,
    )


def check(case: Case, job: Job) -> Choice:
    """Compare the kernel with plain MLX on inputs of the case; do not time them."""
    inputs = job.inputs(0)
    mx.eval(inputs)
    try:
        began = time.perf_counter()
        outputs = flat(job.kernel(*inputs))
        mx.eval(outputs)
        first = time.perf_counter() - began
        error = relative_error(outputs, flat(job.plain(*inputs)))
    except (RuntimeError, ValueError) as refused:
        if isinstance(refused, DoRAError):
            raise
        text = str(refused).strip().splitlines()[0]
        return Choice(takes_kernel=False, problem=f"does not run ({text})")
    bound = allowed_error(case.dtype_name, device_backend())
    if error <= bound:  # false for NaN
        return Choice(takes_kernel=True, first_seconds=first, error=error)
    return Choice(
        takes_kernel=False,
        first_seconds=first,
        problem=f"is wrong by {error:.1e} (allowed {bound:.0e})",
    )


def is_faster(kernel: list[float], plain: list[float]) -> bool:
    """Return whether the kernel saves more than `MARGIN` beyond the noise.

    Its second slowest round is compared with the second fastest of plain MLX, so that
    a machine busy with other work chooses plain MLX rather than by chance.
    """
    return sorted(kernel)[-2] < sorted(plain)[1] * (1 - MARGIN)


def rounds(job: Job) -> tuple[list[float], list[float]]:
    """Return the seconds of a call by the kernel and by plain MLX, in each round.

    Both sides run in turn, for a millisecond at a time, on inputs that together exceed
    the caches.
    """
    size = sum(array.nbytes for array in job.inputs(0))
    count = min(_MAX_SETS, max(1, -(-_FRESH_BYTES // max(size, 1))))
    sets = [job.inputs(seed) for seed in range(count)]
    mx.eval(sets)
    sides = [
        partial(_round, mx.compile(side) if job.is_compiled else side, sets, job.linked)
        for side in (job.kernel, job.plain)
    ]
    calls = []
    for side in sides:
        side(0, 1)  # warm
        once = max(side(0, 2) / 2, 1e-7)
        calls.append(max(1, min(count * 4, round(_ROUND_SECONDS / once))))
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(_ROUNDS):
        for side, each, taken in zip(sides, calls, times, strict=True):
            taken.append(side(number * each, each) / each)
    del sets
    return times


def _round(
    side: Callable[..., Any],
    sets: list[tuple[mx.array, ...]],
    linked: int | None,
    start: int,
    calls: int,
) -> float:
    """Return the seconds of `calls` calls, on sets of inputs from `start` on."""
    mx.synchronize()
    began = time.perf_counter()
    results, link = [], mx.array(0.0)
    for number in range(start, start + calls):
        inputs = list(sets[number % len(sets)])
        if linked is not None:
            inputs[linked] = inputs[linked] + link
        outputs = flat(side(*inputs))
        results.append(outputs)
        if linked is not None:
            link = 0.0 * outputs[-1].reshape(-1)[0].astype(mx.float32)
    mx.eval(results)
    mx.synchronize()
    return time.perf_counter() - began


def flat(results: Any) -> list[mx.array]:
    """Return the arrays of a nested list or tuple in order."""
    if isinstance(results, mx.array):
        return [results]
    return [array for result in results for array in flat(result)]


def normal(*shape: int, seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Return normal random values that leave MLX's global random state alone."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


_REPORTED: set[tuple[str, mx.Dtype]] = set()


def report(case: Case, choice: Choice) -> None:
    """Log that a kernel cannot be used here, once per process, op and dtype."""
    key = case.name, case.dtype
    if choice.problem is None or key in _REPORTED:
        return
    _REPORTED.add(key)
    logger.error(
        "the %s kernel of %s in %s %s on this machine, at %s; plain MLX is used "
        "instead. Please report it with the output of mlx_dora.doctor.",
        device_backend(),
        case.name,
        case.dtype_name,
        choice.problem,
        case.text,
    )
