"""Delays Ctrl-C, SIGTERM and SIGHUP until the end of a step."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from mlx_dora.io.stops import STOPS, Stopped

logger = logging.getLogger(__name__)


@contextmanager
def delayed_interrupt() -> Iterator[Callable[[], int]]:
    """Delay the first interrupt; yields a function that returns its number, or 0.

    Ctrl-C (SIGINT), SIGTERM and SIGHUP are interrupts, unless the latter two are
    ignored, as under ``nohup``. The interrupt is acknowledged at once, even while MLX
    computes. A second interrupt takes effect as soon as MLX returns. Outside the main
    thread, where Python delivers no signals, nothing changes.
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
        if len(arrived) > 1:  # Python calls a handler once for signals in a row
            signal.raise_signal(number)

    for number in (signal.SIGINT, *STOPS):
        handler = signal.getsignal(number)
        # None: not installed from Python, so Python could not restore it.
        if handler is None or (number in STOPS and handler is signal.SIG_IGN):
            continue
        before[number] = handler
        signal.signal(number, delay)
    try:
        with _acknowledging(before) as arrived:
            yield lambda: received
    finally:
        reinstate()


@contextmanager
def _acknowledging(numbers: Collection[int]) -> Iterator[list[int]]:
    """Log the first of some signals from a thread; yields the signals as they arrive.

    A Python handler would run only when the main thread returns from MLX.
    """
    arrived: list[int] = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while number := os.read(reader, 1)[0]:
            if number in numbers:
                arrived.append(number)
                if len(arrived) == 1:
                    logger.warning("finishing the step and saving; %s", _AGAIN[number])

    thread = threading.Thread(target=listen, daemon=True)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    try:
        yield arrived
    finally:
        signal.set_wakeup_fd(previous)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


_AGAIN: dict[int, str] = {
    signal.SIGINT: "Ctrl-C again stops at once",
    **{stop: f"{stop.name} again stops at once" for stop in STOPS},
}


def interruption(number: int) -> KeyboardInterrupt:
    """The exception of a signal: `KeyboardInterrupt` for Ctrl-C, else `Stopped`."""
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)
