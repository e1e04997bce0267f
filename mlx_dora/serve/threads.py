"""Waits for the end of a thread that has used MLX."""

import sys
import time
from pathlib import Path
from threading import Thread

_TASKS = Path("/proc/self/task")
_GIVE_UP, _POLL = 10.0, 0.005  # seconds
_ELSEWHERE = 0.2  # seconds that a thread is given where its end cannot be seen


def join(thread: Thread) -> None:
    """Wait until the system has ended a thread, too.

    MLX frees Python objects of a thread after Python 3.12 and older count it as ended.
    If the interpreter ends in between, the process aborts (exit code 134). From Python
    3.13 on, `Thread.join` waits for the system's thread; before, Linux lists it.
    """
    thread.join()
    if sys.version_info >= (3, 13) or thread.native_id is None:
        return
    if not _TASKS.exists():
        time.sleep(_ELSEWHERE)
        return
    task = _TASKS / str(thread.native_id)
    end = time.monotonic() + _GIVE_UP
    while task.exists() and time.monotonic() < end:
        time.sleep(_POLL)  # also hands the interpreter's lock to that thread
