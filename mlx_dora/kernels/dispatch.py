"""Selects and runs the kernels of `plans`, each built on first use.

``MLX_DORA_KERNELS`` selects: ``auto`` (the default) uses a kernel if the default device
supports it and the sizes satisfy `CROSSOVERS`. ``metal`` and ``cuda`` use it for all
sizes, and are an error on other devices. ``reference`` uses plain MLX.

This code has never run on a GPU of either kind; see ``metal/README.md``.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar, cast

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.kernels._source import in_cuda, read_source
from mlx_dora.kernels.plans import KERNELS, Kernel, Launch

P = ParamSpec("P")
R = TypeVar("R")
_LOG = logging.getLogger(__name__)
SWITCH = "MLX_DORA_KERNELS"
_CHOICES = ("auto", "metal", "cuda", "reference")


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """Limits within which ``auto`` uses the kernel of an op.

    Attributes:
        elements: Least size of the largest operand. Below it, a launch costs more than
            the MLX ops it replaces: a hand-written kernel was reported at 0.73 times
            the speed of MLX ops on 1 x 4096, and 1.2 to 1.75 times from 512 rows (M2
            and M3). 2^18 lies between.
        rank: Greatest rank. The kernel's matrix product runs in float32 on the ordinary
            arithmetic units, with 2r operations per element. Chips do about 35 such
            operations per byte read (M1 2.6 TFLOP/s at 68 GB/s, M4 Max 18 at 546), so
            that the product takes less time than reading the weights up to r = 32 for
            2-byte weights, and r = 16 for packed weights. Above that, MLX's matrix
            product is faster.
    """

    elements: int
    rank: int


# Calculated from published figures, not measured: `mlx_dora.doctor` measures them.
CROSSOVERS = {
    "normalize_rows": Crossover(elements=1 << 18, rank=0),
    "adapted_norm": Crossover(elements=1 << 18, rank=32),
    "adapted_norm_packed": Crossover(elements=1 << 18, rank=16),
    # The kernel reads and writes four bytes per element. The reference also writes the
    # low-rank part in float32.
    "dora_scale": Crossover(elements=1 << 18, rank=128),
    # Runs once per model, and the reference makes float32 copies.
    "fused_weight": Crossover(elements=1 << 18, rank=512),
}
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_MAX_RANK = 512  # B's rows in threadgroup memory


def chosen_backend() -> str:
    """Return ``metal``, ``cuda`` or ``reference`` for the environment and device.

    Raises:
        DoRAError: If ``MLX_DORA_KERNELS`` is not a known value, or is a backend that
            does not match MLX's default device.
    """
    return backend_of(os.environ.get(SWITCH), mx.default_device().type == mx.gpu)


@lru_cache
def backend_of(choice: str | None, _is_gpu: bool) -> str:
    """Return `chosen_backend` for a value of ``MLX_DORA_KERNELS`` and a device type."""
    choice = choice or "auto"
    if choice not in _CHOICES:
        raise DoRAError(
            f"{SWITCH} is {choice!r}; expected one of {', '.join(_CHOICES)}."
        )
    if choice == "reference":
        return choice
    device = device_backend()
    if choice in ("auto", device):
        return device
    here = "the CPU" if device == "reference" else device
    raise DoRAError(
        f"{SWITCH}={choice}, but MLX's default device here is {here}; "
        "set it to auto or reference."
    )


def device_backend() -> str:
    """Return the backend that the default device can run."""
    if mx.default_device().type != mx.gpu:
        return "reference"
    return "metal" if mx.metal.is_available() else "cuda"


def select(
    plain: Callable[P, R], kernel: Callable[P, R], pays: Callable[P, bool]
) -> Callable[P, R]:
    """Return an op that runs `kernel` where it pays, and `plain` otherwise.

    Args:
        plain: The op in plain MLX.
        kernel: The op with the kernel, for arguments of any size.
        pays: Whether to use the kernel for these arguments; see `takes_kernel`.
    """

    @wraps(plain)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        # Both are cached look-ups, so that the choice is cheap on a CPU.
        backend = backend_of(os.environ.get(SWITCH), mx.default_device().type == mx.gpu)
        if backend == "reference" or not pays(*args, **kwargs):
            return plain(*args, **kwargs)
        return kernel(*args, **kwargs)

    return op


def takes_kernel(
    op: str,
    *,
    elements: int,
    rank: int,
    dtype: mx.Dtype,
    check: Callable[[], float],
    variant: str = "",
) -> bool:
    """Return whether to use the kernel of `op` for a call.

    Args:
        op: A key of `CROSSOVERS`.
        elements: Size of the largest operand.
        rank: Rank of the update; 0 if the op has no update.
        dtype: Dtype of the large operands.
        check: Runs the kernel on a small input and returns its relative error against
            the reference. Called once per process for each `op`, `dtype` and `variant`.
        variant: Other property that needs separate compilation, such as packed bits.
    """
    backend = chosen_backend()
    if backend == "reference" or elements == 0 or rank > _MAX_RANK:
        return False
    if dtype not in _DTYPES:
        return False
    is_forced = os.environ.get(SWITCH) == backend
    limit = CROSSOVERS[op]
    if not is_forced and (elements < limit.elements or rank > limit.rank):
        return False
    key = (backend, op, str(dtype).removeprefix("mlx.core."), variant)
    if key not in _VERDICTS:
        _VERDICTS[key] = _passes(key, check)
    return _VERDICTS[key]


_VERDICTS: dict[tuple[str, str, str, str], bool] = {}


def allowed_error(dtype: str, backend: str) -> float:
    """Return the allowed relative RMS error, about that of the reference itself."""
    if dtype == "float32" and backend == "cuda":
        return 2e-3  # MLX's CUDA build multiplies in TF32
    return {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}[dtype]


def _passes(key: tuple[str, str, str, str], check: Callable[[], float]) -> bool:
    backend, op, dtype, variant = key
    try:
        error = check()
    except (RuntimeError, ValueError) as problem:
        if isinstance(problem, DoRAError):
            raise
        trouble = f"does not run ({str(problem).strip().splitlines()[0]})"
    else:
        bound = allowed_error(dtype, backend)
        if error <= bound:  # false for NaN
            return True
        trouble = f"is wrong by {error:.1e} (allowed {bound:.0e})"
    name = f"{op} {variant}".strip()
    _LOG.error(
        "the %s kernel of %s in %s %s on this machine; plain MLX is used instead. "
        "Please report it with the output of mlx_dora.doctor.",
        backend,
        name,
        dtype,
        trouble,
    )
    return False


@lru_cache
def build(name: str, backend: str) -> Callable[..., list[mx.array]]:
    """Build MLX's callable for ``metal/<name>.metal``."""
    kernel = KERNELS[name]
    header, body = read_source("common.h"), read_source(f"{name}.metal")
    make = mx.fast.metal_kernel
    if backend == "cuda":
        header = read_source("cuda_prelude.h") + in_cuda(header, is_body=False)
        body = in_cuda(body, is_body=True)
        make = mx.fast.cuda_kernel
    made = make(
        name=f"mlx_dora_{name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        header=header,
        source=body,
    )
    return cast(Callable[..., list[mx.array]], made)


def run(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    launch: Launch,
    *,
    initial: float | None = None,
) -> tuple[mx.array, ...]:
    """Launch a kernel on the default device.

    Args:
        kernel: An entry of `KERNELS`.
        inputs: Inputs in order; MLX copies inputs that are not contiguous.
        launch: Result of the kernel's planning function in `plans`.
        initial: Initial value of the outputs; tests use NaN.

    Returns:
        Outputs in order.
    """
    fill = {} if initial is None else {"init_value": initial}
    outputs = build(kernel.name, device_backend())(
        inputs=list(inputs),
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=list(launch.output_shapes),
        output_dtypes=list(launch.output_dtypes),
        **fill,
    )
    return tuple(outputs)


def relative_error(
    actual: mx.array | Sequence[mx.array], expected: mx.array | Sequence[mx.array]
) -> float:
    """Return the worst ratio of RMS error to RMS value of corresponding arrays."""
    if isinstance(actual, mx.array):
        actual = [actual]
    if isinstance(expected, mx.array):
        expected = [expected]
    errors = []
    for got, want in zip(actual, expected, strict=True):
        truth = want.astype(mx.float32)
        off = mx.square(got.astype(mx.float32) - truth).sum()
        errors.append(mx.sqrt(off / mx.maximum(mx.square(truth).sum(), 1e-30)))
    return float(np.array(mx.stack(errors)).max())  # NumPy's maximum propagates NaN
