"""Device, memory and versions, as MLX and the operating system tell them."""

import dataclasses
import os
import platform
import re
import subprocess
import sys
from importlib import metadata

import mlx.core as mx

_BUILDS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
_PACKAGES = ("mlx", "mlx-lm", "transformers", "safetensors", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Where MLX computes here."""

    device: str
    chip: str
    cores: int
    system: str
    python: str
    is_gpu: bool
    is_mac: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory limits; None where the system does not tell."""

    total_bytes: int | None
    recommended_bytes: int | None
    largest_buffer_bytes: int | None
    mlx_limit_bytes: int
    wired_limit_mb: int | None
    sleep_minutes: int | None = None


def describe_machine() -> Machine:
    """Name the device that MLX uses by default, the chip and the system."""
    device = mx.default_device()
    is_gpu = device.type == mx.gpu
    kind = "CPU"
    if is_gpu:
        kind = "GPU (Metal)" if mx.metal.is_available() else "GPU (CUDA)"
    system = platform.platform()
    if sys.platform == "darwin":
        system = f"macOS {platform.mac_ver()[0]} ({platform.machine()})"
    info = mx.device_info(device)
    return Machine(
        device=kind,
        chip=str(info.get("device_name") or platform.processor() or "unknown"),
        cores=_usable_cores(),
        system=system,
        python=platform.python_version(),
        is_gpu=is_gpu,
        is_mac=sys.platform == "darwin",
    )


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_memory() -> Memory:
    """Total memory and the limits within which MLX allocates."""
    info = mx.device_info(mx.default_device())

    def size(key: str) -> int | None:
        return int(info[key]) if key in info else None

    return Memory(
        total_bytes=size("memory_size") or _system_memory(),
        recommended_bytes=size("max_recommended_working_set_size"),
        largest_buffer_bytes=size("max_buffer_length"),
        mlx_limit_bytes=mx.get_memory_limit(),
        wired_limit_mb=_wired_limit_mb(),
        sleep_minutes=_sleep_minutes(),
    )


def _system_memory() -> int | None:
    names = os.sysconf_names
    if "SC_PAGE_SIZE" in names and "SC_PHYS_PAGES" in names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _wired_limit_mb() -> int | None:
    """What macOS lets the GPU wire down; 0 is the system's default."""
    told = _ask_mac("/usr/sbin/sysctl", "-n", "iogpu.wired_limit_mb")
    return int(told) if told.isdecimal() else None


def _sleep_minutes() -> int | None:
    """After how many idle minutes macOS sleeps, on the present power; 0 is never."""
    found = re.search(r"^\s*sleep\s+(\d+)", _ask_mac("/usr/bin/pmset", "-g"), re.M)
    return int(found[1]) if found else None


def _ask_mac(*command: str) -> str:
    if sys.platform != "darwin":
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def describe_versions() -> dict[str, str]:
    """Versions of what decides a result here, MLX's builds included."""
    found = {name: installed_version(name) for name in (*_PACKAGES, *_BUILDS)}
    return {name: version for name, version in found.items() if version}
