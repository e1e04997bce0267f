"""Finds the backend, and builds and runs the kernels of `plans` on it.

``MLX_DORA_KERNELS`` selects: ``auto`` (the default) uses a kernel where it was measured
to be faster than plain MLX on this device, see `choice`. ``metal`` and ``cuda`` use it
for all sizes, and are an error on other devices. ``reference`` uses plain MLX.
"""

import os
import platform
import re
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Concatenate, Literal, ParamSpec, TypeVar, cast

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.kernels._source import HEADERS, in_cuda, read_source
from mlx_dora.kernels.plans import KERNELS, Kernel, Launch

P = ParamSpec("P")
R = TypeVar("R")
SWITCH = "MLX_DORA_KERNELS"
_AUTO = (None, "", "auto")
_CHOICES = ("auto", "metal", "cuda", "reference")


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


def chosen_mode() -> Literal["reference", "auto", "forced"]:
    """Return whether plain MLX, the faster side or always a kernel is to run."""
    choice = os.environ.get(SWITCH)
    if backend_of(choice, mx.default_device().type == mx.gpu) == "reference":
        return "reference"
    return "auto" if choice in _AUTO else "forced"


def select(
    plain: Callable[P, R],
    kernel: Callable[P, R],
    takes: Callable[Concatenate[bool, P], bool],
) -> Callable[P, R]:
    """Return an op that runs `kernel` where it is taken, and `plain` otherwise.

    Args:
        plain: The op in plain MLX.
        kernel: The op with the kernel, for arguments of any size.
        takes: Whether to use the kernel, from whether it is forced and the op's
            arguments; see `choice.takes_kernel`.
    """

    @wraps(plain)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        # Cheap look-ups, made at every call; reading the environment costs most.
        choice = os.environ.get(SWITCH)
        backend = backend_of(choice, mx.default_device().type == mx.gpu)
        if backend == "reference" or not takes(choice not in _AUTO, *args, **kwargs):
            return plain(*args, **kwargs)
        return kernel(*args, **kwargs)

    return op


def multiplies_in_tf32(backend: str) -> bool:
    """Return whether MLX rounds float32 factors to TF32, 10 bits of mantissa.

    Read from MLX 0.32: cuBLAS and cuDNN do so, and on Metal the matrix units of chips
    from generation 17 (18 on phones) under macOS 26.2 or later. ``MLX_ENABLE_TF32=0``
    turns it off.

    Args:
        backend: ``metal``, ``cuda`` or ``reference``.
    """
    if os.environ.get("MLX_ENABLE_TF32", "1") == "0":
        return False
    if backend != "metal":
        return backend == "cuda"
    release = tuple(map(int, re.findall(r"\d+", platform.mac_ver()[0])[:2]))
    info = mx.device_info(mx.default_device())
    chip = re.search(r"g(\d+)([a-z])$", str(info.get("architecture", "")))
    if chip is None or release < (26, 2):
        return False
    return int(chip[1]) >= (18 if chip[2] == "p" else 17)


def allowed_error(dtype: str, backend: str) -> float:
    """Return the allowed relative RMS error, about that of the reference itself."""
    if dtype == "float32" and multiplies_in_tf32(backend):
        return 2e-3
    return {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}[dtype]


@lru_cache
def build(name: str, backend: str) -> Callable[..., list[mx.array]]:
    """Build MLX's callable for ``metal/<name>.metal``."""
    kernel = KERNELS[name]
    header = "".join(read_source(part) for part in HEADERS)
    body = read_source(f"{name}.metal")
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
