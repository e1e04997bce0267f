"""SIGTERM and SIGHUP as exceptions, so that whatever is half-written is cleaned up."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGHUP)
"""What clusters, containers and closed terminals send."""


class Stopped(KeyboardInterrupt):
    """The process was asked to end; an interrupt like Ctrl-C, with its signal.

    Args:
        number: Which signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"Stopped by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def raising_stops() -> Iterator[None]:
    """Raise `Stopped` where the main thread is when SIGTERM or SIGHUP comes.

    A signal that is ignored (``nohup``) or handled already is left alone, and so is
    everything outside the main thread, where Python delivers no signals. Further
    signals do not disturb the cleaning up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [one for one in STOPS if signal.getsignal(one) is signal.SIG_DFL]

    def stop(number: int, _frame: Any) -> None:
        for one in ours:
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(number)

    for one in ours:
        signal.signal(one, stop)
    try:
        yield
    finally:
        for one in ours:
            signal.signal(one, signal.SIG_DFL)
