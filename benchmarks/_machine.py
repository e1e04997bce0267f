"""Where a figure was measured: chip, system, versions, commit. Imports no mlx."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


def describe_machine() -> dict[str, str | int]:
    """Return the facts that a figure needs beside it."""
    import mlx.core as mx

    device = mx.default_device()
    return {
        "chip": _chip(),
        "cores": _usable_cores(),
        "device": "gpu" if device == mx.Device(mx.gpu) else "cpu",
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "mlx": metadata.version("mlx"),
        "mlx_lm": metadata.version("mlx-lm"),
        "commit": _commit(),
    }


def _chip() -> str:
    import mlx.core as mx

    name = str(mx.device_info(mx.default_device()).get("device_name", ""))
    return name or platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _commit() -> str:
    """Return the short hash of the checkout, with ``+`` if tracked files differ."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
    except FileNotFoundError:
        return "unknown"
    dirty = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}{'+' if dirty else ''}" if commit else "unknown"
