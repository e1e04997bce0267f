"""The CUDA compilers of this machine: nvcc, and NVRTC, which MLX itself uses.

Both come from PyPI (``pip install -e '.[cuda-check]'``); neither needs a GPU.
"""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

ARCHITECTURE = "sm_90a"  # as MLX names an H100 or H200


def _installed(pattern: str) -> Path | None:
    """Return a file of NVIDIA's PyPI packages."""
    for place in sys.path:
        for path in sorted(Path(place).glob(f"nvidia/cu*/{pattern}")):
            return path
    return None


def _nvcc() -> Path | None:
    found = shutil.which("nvcc")
    return Path(found) if found else _installed("bin/nvcc")


NVCC = _nvcc()
NVRTC = _installed("lib/libnvrtc.so.*")


@lru_cache
def _include_folders() -> list[Path]:
    """Return where the CUDA headers are, which nvcc says."""
    headers = _installed("include/cuda_bf16.h")
    if headers is None:
        done = subprocess.run(
            [str(NVCC), "--dryrun", "-E", "-x", "cu", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        )
        top = next(
            line.split("=", 1)[1]
            for line in done.stderr.splitlines()
            if line.startswith("#$ TOP=")
        )
        headers = Path(top) / "include" / "cuda_bf16.h"
    return [headers.parent, headers.parent / "cccl"]


def by_nvcc(text: str, folder: Path) -> Path:
    """Compile to a cubin; a warning is an error."""
    source, cubin = folder / "kernels.cu", folder / "nvcc.cubin"
    source.write_text(text)
    command = [NVCC, f"-arch={ARCHITECTURE}", "-std=c++17", "-cubin"]
    done = subprocess.run(
        [*command, "-Werror=all-warnings", "-diag-suppress=177", "-o", cubin, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:3000]
    return cubin


def by_nvrtc(text: str, folder: Path) -> Path:
    """Compile to a cubin with the options of `mlx/backend/cuda/jit_module.cpp`."""
    assert NVRTC is not None
    for path in sorted(NVRTC.parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # else not found
    library = ctypes.CDLL(str(NVRTC))
    program = ctypes.c_void_p()
    made = library.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None
    )
    assert made == 0
    options = [
        "--device-as-default-execution-space",
        f"--gpu-architecture={ARCHITECTURE}",
        *(f"--include-path={path}" for path in _include_folders()),
    ]
    given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    status = library.nvrtcCompileProgram(program, len(options), given)
    log = _result(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
    assert status == 0, log.decode(errors="replace")[:3000]
    cubin = folder / "nvrtc.cubin"
    cubin.write_bytes(
        _result(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    )
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin


def _result(
    size_of: Callable[..., int], get: Callable[..., int], program: ctypes.c_void_p
) -> bytes:
    size = ctypes.c_size_t()
    assert size_of(program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert get(program, buffer) == 0
    return buffer.raw


# NVRTC needs headers too, which come with nvcc.
COMPILERS: dict[str, Callable[[str, Path], Path]] = {
    name: compiler
    for name, compiler, is_here in (
        ("nvrtc", by_nvrtc, NVRTC is not None and NVCC is not None),
        ("nvcc", by_nvcc, NVCC is not None),
    )
    if is_here
}
