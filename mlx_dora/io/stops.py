"""Turns SIGTERM and SIGHUP into exceptions, so that partial output is cleaned up."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that clusters, containers and closed terminals send."""


class Stopped(KeyboardInterrupt):
    """Raised when the process was asked to end; an interrupt like Ctrl-C.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"Stopped by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def raising_stops() -> Iterator[None]:
    """Raise `Stopped` in the main thread when SIGTERM or SIGHUP arrives.

    A signal that is ignored (``nohup``) or already handled is not changed. Outside the
    main thread, where Python delivers no signals, nothing changes. Further signals do
    not interrupt the cleanup.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in STOPS if signal.getsignal(number) is signal.SIG_DFL]

    def stop(number: int, _frame: Any) -> None:
        for handled in ours:
            signal.signal(handled, signal.SIG_IGN)
        raise Stopped(number)

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
