"""OpenBLAS in front of MLX's reference BLAS on Linux without a GPU.

MLX's CPU wheel carries an unoptimised BLAS: a float32 matrix product runs at about 2
GFLOP/s where OpenBLAS reaches a hundred times that. Loading OpenBLAS with global
symbols before ``mlx.core`` makes MLX use it; afterwards it has no effect. So this
module imports no MLX, and every command calls `preload` first.
"""

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import logging
import os
import sys
from typing import Literal

LIBRARY = "libopenblas.so.0"
_GPU_BUILDS = ("mlx-metal", "mlx-cuda-12", "mlx-cuda-13")

State = Literal["not needed", "loaded", "environment", "missing", "too late"]

_log = logging.getLogger(__name__)
_status: "OpenBLASStatus | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenBLASStatus:
    """What became of OpenBLAS in this process.

    ``loaded`` means that the library was opened in time; whether MLX is quick is
    measured, not assumed, by ``mlx_dora.doctor``.
    """

    state: State
    message: str


def _decide() -> OpenBLASStatus:
    if not sys.platform.startswith("linux"):
        return OpenBLASStatus(
            state="not needed", message=f"{sys.platform} has its own BLAS."
        )
    if not _is_cpu_build():
        return OpenBLASStatus(
            state="not needed", message="MLX's CPU build for Linux is not installed."
        )
    if "openblas" in os.environ.get("LD_PRELOAD", ""):
        return OpenBLASStatus(
            state="environment", message="LD_PRELOAD names OpenBLAS already."
        )
    if "mlx.core" in sys.modules:
        return OpenBLASStatus(
            state="too late",
            message="mlx.core was imported before OpenBLAS could be loaded, so float32 "
            "products may be a hundred times slower than they need to be: call "
            "mlx_dora.openblas.preload() before importing mlx, or start Python with "
            f"LD_PRELOAD={LIBRARY}.",
        )
    try:
        ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return OpenBLASStatus(
            state="missing",
            message=f"{LIBRARY} is not installed, so float32 products run about a "
            "hundred times slower than they need to: "
            "sudo apt-get install libopenblas0-pthread.",
        )
    return OpenBLASStatus(
        state="loaded", message=f"{LIBRARY} was loaded before mlx.core."
    )


def _is_cpu_build() -> bool:
    """Whether the installed MLX computes on the CPU alone, without importing MLX."""
    if importlib.util.find_spec("mlx") is None:
        return False
    return not any(_is_installed(name) for name in _GPU_BUILDS)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def preload() -> OpenBLASStatus:
    """Load OpenBLAS for MLX where that helps; safe to call again.

    Returns:
        What was done. A library that is missing, or a call that comes too late, is
        logged as a warning once per process and never an error.
    """
    global _status
    if _status is None:
        _status = _decide()
        if _status.state in ("missing", "too late"):
            _log.warning("%s", _status.message)
    return _status
