"""Admits requests up to a limit, and lets those admitted finish before a stop."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_dora.errors import DoRAError


class BusyError(DoRAError):
    """The server has as many requests as it may hold."""


class StoppingError(DoRAError):
    """The server is about to stop, and takes no new requests."""


class Desk:
    """Counts the requests that are being answered; usable from several threads.

    Args:
        limit: Requests that may be answered or wait at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self.admitted = 0

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._deadline is not None

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request while the block answers it.

        Raises:
            BusyError: If there are too many requests.
            StoppingError: If the server is about to stop.
        """
        with self._lock:
            if self.is_stopping:
                raise StoppingError("the server is stopping.")
            if self.admitted >= self._limit:
                raise BusyError(
                    f"{self._limit} requests run or wait (--max-queue); try later."
                )
            self.admitted += 1
        try:
            yield
        finally:
            with self._lock:
                self.admitted -= 1

    def stop(self, seconds: float) -> None:
        """Take no more requests, and give those admitted some time to finish.

        It takes no lock, because a signal handler calls it.
        """
        if self._deadline is None:
            self._deadline = time.monotonic() + seconds

    def may_end(self) -> bool:
        """Return whether a stopping server has answered everything, or time is up.

        Raises:
            DoRAError: If time is up and requests are unfinished.
        """
        if self._deadline is None:
            return False
        if not self.admitted:
            return True
        if time.monotonic() < self._deadline:
            return False
        raise DoRAError(
            f"stopped with {self.admitted} unfinished requests, after --drain-seconds."
        )
