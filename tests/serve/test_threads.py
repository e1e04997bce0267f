"""A thread is waited for until the system has ended it."""

import ctypes
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from mlx_dora.serve.threads import join

SLOW_MS = 200


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_join_waits_for_what_a_thread_does_after_python_counts_it_as_ended() -> None:
    libc = ctypes.CDLL(None)
    key = ctypes.c_uint()
    # At its end, the system's thread calls usleep with the value that it stored.
    assert libc.pthread_key_create(ctypes.byref(key), libc.usleep) == 0

    def store() -> None:
        libc.pthread_setspecific(key, ctypes.c_void_p(SLOW_MS * 1000))

    thread = Thread(target=store)
    thread.start()
    task = Path(f"/proc/self/task/{thread.native_id}")
    start = time.monotonic()
    join(thread)
    assert not task.exists()
    assert time.monotonic() - start > SLOW_MS / 1000 / 2  # the slow end did happen
    assert libc.pthread_key_delete(key) == 0


def test_a_thread_that_never_started_is_no_reason_to_wait() -> None:
    thread = Thread(target=print)
    with pytest.raises(RuntimeError):  # as Thread.join does
        join(thread)
