"""Ctrl-C, SIGTERM and SIGHUP that wait for the step to end."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlx_dora.io.stops import STOPS, Stopped

logger = logging.getLogger(__name__)


@contextmanager
def delayed_interrupt() -> Iterator[Callable[[], int]]:
    """Hold back the first interrupt; yields a function that says which came, or 0.

    Ctrl-C (SIGINT), SIGTERM and SIGHUP are interrupts; the latter two are left alone
    where they are ignored, as under ``nohup``. A second one interrupts at once. Outside
    the main thread, where Python delivers no signals, nothing is changed.
    """
    asked = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before: dict[int, Any] = {}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: Any) -> None:
        nonlocal asked
        asked = number
        put_back()
        logger.warning("finishing the step and saving; %s", _AGAIN[number])

    for number in (signal.SIGINT, *STOPS):
        handler = signal.getsignal(number)
        # None: installed by something else than Python, which could not put it back.
        if handler is None or (number in STOPS and handler is signal.SIG_IGN):
            continue
        before[number] = handler
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        put_back()


_AGAIN: dict[int, str] = {
    signal.SIGINT: "Ctrl-C again stops at once",
    **{one: f"{one.name} again stops at once" for one in STOPS},
}


def interruption(number: int) -> KeyboardInterrupt:
    """The exception to raise once the step is done: `Stopped`, or Ctrl-C's own."""
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)
