"""Delays Ctrl-C, SIGTERM and SIGHUP until the end of a step."""

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
    """Delay the first interrupt; yields a function that returns its number, or 0.

    Ctrl-C (SIGINT), SIGTERM and SIGHUP are interrupts, unless the latter two are
    ignored, as under ``nohup``. A second interrupt takes effect at once. Outside the
    main thread, where Python delivers no signals, nothing changes.
    """
    received = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before: dict[int, Any] = {}

    def reinstate() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def delay(number: int, _frame: Any) -> None:
        nonlocal received
        received = number
        reinstate()
        logger.warning("finishing the step and saving; %s", _AGAIN[number])

    for number in (signal.SIGINT, *STOPS):
        handler = signal.getsignal(number)
        # None: not installed from Python, so Python could not restore it.
        if handler is None or (number in STOPS and handler is signal.SIG_IGN):
            continue
        before[number] = handler
        signal.signal(number, delay)
    try:
        yield lambda: received
    finally:
        reinstate()


_AGAIN: dict[int, str] = {
    signal.SIGINT: "Ctrl-C again stops at once",
    **{stop: f"{stop.name} again stops at once" for stop in STOPS},
}


def interruption(number: int) -> KeyboardInterrupt:
    """The exception of a signal: `KeyboardInterrupt` for Ctrl-C, else `Stopped`."""
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)
