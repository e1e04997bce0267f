"""MLX's memory settings while a model trains, and the system's memory."""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx


@contextmanager
def wired_memory() -> Iterator[None]:
    """Keep up to the recommended working set resident on an Apple GPU, as mlx-lm does.

    Restores the limit at the end. On other devices, does nothing.
    """
    limit = mx.device_info().get("max_recommended_working_set_size")
    if not mx.metal.is_available() or not isinstance(limit, int):
        yield
        return
    before = mx.set_wired_limit(limit)
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)


def trim_cache(threshold: int) -> None:
    """Free MLX's buffer cache if it holds more bytes than `threshold`."""
    if mx.get_cache_memory() > threshold:
        mx.clear_cache()


def system_memory() -> tuple[int, int] | None:
    """Bytes that the system can still give to processes, and its total.

    Linux: ``MemAvailable`` and ``MemTotal`` of ``/proc/meminfo``, or the limit of the
    process's control group if that leaves less. macOS: the kernel's own measure,
    ``kern.memorystatus_level``, a percentage of ``hw.memsize``. Elsewhere None.
    """
    if sys.platform == "darwin":
        level, total = _sysctl("kern.memorystatus_level"), _sysctl("hw.memsize")
        return total * level // 100, total
    text = _text(Path("/proc/meminfo"))
    kilobytes = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", text, re.M))
    if len(kilobytes) < 2:
        return None
    system = int(kilobytes["MemAvailable"]) << 10, int(kilobytes["MemTotal"]) << 10
    return min(system, _group_memory() or system)


def _group_memory(home: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """The same of the process's control group (version 2), if it has a limit."""
    most, used = (_text(home / f"memory.{name}").strip() for name in ("max", "current"))
    if not (most.isdecimal() and used.isdecimal()):
        return None
    cached = re.search(r"^inactive_file (\d+)$", _text(home / "memory.stat"), re.M)
    free = int(most) - int(used) + (int(cached[1]) if cached else 0)
    return max(free, 0), int(most)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _sysctl(name: str) -> int:
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    places = ctypes.byref(value), ctypes.byref(size)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), *places, None, 0)
    assert not failed, f"sysctl {name} failed"
    return value.value
