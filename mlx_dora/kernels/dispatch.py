"""Choosing and running the kernels of `plans`: each is built once, on first use.

``MLX_DORA_KERNELS`` decides: ``auto`` (the default) takes a kernel where the default
device has it and `CROSSOVERS` says that it pays; ``metal`` and ``cuda`` take it
whatever the size, and are an error elsewhere; ``reference`` is plain MLX.

Nothing here has ever run on a GPU of either kind; see ``metal/README.md``.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.kernels._source import in_cuda, read_source
from mlx_dora.kernels.plans import KERNELS, Kernel, Launch

__all__ = [
    "CROSSOVERS",
    "KERNELS",
    "SWITCH",
    "allowed_error",
    "backend_of",
    "build",
    "chosen_backend",
    "relative_error",
    "run",
    "takes_kernel",
]

_LOG = logging.getLogger(__name__)
SWITCH = "MLX_DORA_KERNELS"
_CHOICES = ("auto", "metal", "cuda", "reference")


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """When ``auto`` takes an op's kernel.

    Attributes:
        elements: Least size of the largest operand. Below it a launch costs more than
            the stock ops it saves: a hand-written kernel was reported at 0.73 times
            the speed of stock ops on 1 x 4096 and 1.2 to 1.75 times from 512 rows on
            (M2 and M3). 2^18 lies between.
        rank: Greatest rank. The product inside runs in float32 on the ordinary
            arithmetic units, 2r operations an element: on chips that do about 35 such
            operations for each byte they read (M1 2.6 TFLOP/s at 68 GB/s, M4 Max 18 at
            546) it stays behind the reading of 2-byte weights up to r = 32, of packed
            ones up to 16. Past that MLX's matrix product is the better tool.
    """

    elements: int
    rank: int


# Calculated from published figures, not measured: `mlx_dora.doctor` measures them.
CROSSOVERS = {
    "normalize_rows": Crossover(elements=1 << 18, rank=0),
    "adapted_norm": Crossover(elements=1 << 18, rank=32),
    "adapted_norm_packed": Crossover(elements=1 << 18, rank=16),
    # Four bytes an element move, read and write; and the reference writes the low-rank
    # part in float32 first.
    "dora_scale": Crossover(elements=1 << 18, rank=128),
    # Once in a model's life, and the reference makes float32 copies.
    "fused_weight": Crossover(elements=1 << 18, rank=512),
}
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_MAX_RANK = 512  # B's rows in threadgroup memory


def chosen_backend() -> str:
    """``metal``, ``cuda`` or ``reference``, by the environment and the device.

    Raises:
        DoRAError: If ``MLX_DORA_KERNELS`` is no known word, or names a backend that
            MLX's default device is not.
    """
    return backend_of(os.environ.get(SWITCH), mx.default_device().type == mx.gpu)


@lru_cache
def backend_of(choice: str | None, _is_gpu: bool) -> str:
    """`chosen_backend` for a value of ``MLX_DORA_KERNELS`` and a kind of device."""
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
    """What the default device could run."""
    if mx.default_device().type != mx.gpu:
        return "reference"
    return "metal" if mx.metal.is_available() else "cuda"


def takes_kernel(
    op: str,
    *,
    elements: int,
    rank: int,
    dtype: mx.Dtype,
    check: Callable[[], float],
    variant: str = "",
) -> bool:
    """Whether a call goes to the kernel of `op`.

    Args:
        op: A key of `CROSSOVERS`.
        elements: Size of the largest operand.
        rank: Rank of the update, 0 if the op has none.
        dtype: Type of the large operands.
        check: Runs the kernel on a small input and gives its relative error against
            the reference; called once a process for each `op`, `dtype` and `variant`.
        variant: What else is compiled separately, such as the bits of a code.
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
    """Relative RMS error allowed against the reference, whose own is of this order."""
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
        if error <= bound:  # a NaN is not
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
    """The callable that MLX makes of ``metal/<name>.metal``."""
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
        inputs: Its inputs in order; those that are not contiguous are copied by MLX.
        launch: What the kernel's planning function in `plans` gave.
        initial: What outputs hold before; tests put NaN there.

    Returns:
        Its outputs in order.
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
    """Worst RMS error over RMS value of corresponding arrays; evaluates them."""
    if isinstance(actual, mx.array):
        actual = [actual]
    if isinstance(expected, mx.array):
        expected = [expected]
    errors = []
    for got, want in zip(actual, expected, strict=True):
        truth = want.astype(mx.float32)
        off = mx.square(got.astype(mx.float32) - truth).sum()
        errors.append(mx.sqrt(off / mx.maximum(mx.square(truth).sum(), 1e-30)))
    return float(np.array(mx.stack(errors)).max())  # NumPy's maximum keeps a NaN
