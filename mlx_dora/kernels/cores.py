"""The number of cores of MLX's GPU, by which launches are sized.

A core is what NVIDIA calls a multiprocessor. MLX 0.32 does not report the number, so
that it comes from the CUDA driver, or from the class of an Apple chip.
"""

import ctypes
from functools import lru_cache

import mlx.core as mx

# On a device that names neither: launches for mid-sized chips suit larger and smaller
# ones better than launches for either end.
UNKNOWN = 32
# Most cores of a chip of each class, by the last letter of its architecture
# (applegpu_g13s): Apple's published numbers up to the M4 generation. MLX tunes its own
# kernels by the same letter.
_APPLE = {"p": 6, "g": 10, "s": 20, "c": 40, "d": 80}
_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


def device_cores() -> int:
    """Return the number of cores of the first GPU, or `UNKNOWN`."""
    return _gpu_cores() if mx.default_device().type == mx.gpu else UNKNOWN


@lru_cache
def _gpu_cores() -> int:
    """Ask once: on CUDA, MLX asks the driver for the free memory at each call."""
    return _cores_of(str(mx.device_info().get("architecture", "")))


def _cores_of(architecture: str) -> int:
    if architecture.startswith("sm_"):
        return _multiprocessors("libcuda.so.1") or UNKNOWN
    return apple_cores(architecture)


def apple_cores(architecture: str) -> int:
    """Return the most cores of an Apple chip of this architecture, or `UNKNOWN`."""
    if not architecture.startswith("applegpu_"):
        return UNKNOWN
    return _APPLE.get(architecture[-1], UNKNOWN)


def _multiprocessors(library: str) -> int:
    """Return the number that the CUDA driver reports for device 0; 0 if it does not."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return 0
    device, count = ctypes.c_int(0), ctypes.c_int(0)
    is_known = (
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(count), _MULTIPROCESSORS, device)
        == 0
    )
    return count.value if is_known else 0
