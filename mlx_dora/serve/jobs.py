"""Runs functions of other threads in the thread that generates."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, Queue
from types import TracebackType
from typing import Any, TypeVar

from mlx_dora.errors import DoRAError

T = TypeVar("T")


class Kept:
    """Hands an exception of a block to whoever waits for its result.

    Args:
        hand_over: Called with the exception, which then ends with the block.
        kind: The exceptions that are handed over; others leave the block.
    """

    def __init__(
        self,
        hand_over: Callable[[Any], Any],
        kind: type[BaseException] = Exception,
    ) -> None:
        self._hand_over, self._kind = hand_over, kind

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, self._kind):
            return False
        self._hand_over(error)
        return True


class Jobs:
    """Functions that wait for the thread that calls `run`.

    Args:
        is_alive: Whether that thread still runs.
    """

    def __init__(self, is_alive: Callable[[], bool]) -> None:
        self._is_alive = is_alive
        self._waiting: Queue[tuple[Callable[[], Any], Future]] = Queue()
        self._thread: int | None = None

    def own(self) -> None:
        """Make the current thread the one that runs the functions."""
        self._thread = threading.get_ident()

    def call(self, job: Callable[[], T]) -> T:
        """Run a function in that thread, wait, and return its result.

        Raises:
            DoRAError: If the thread died. An exception of `job` is raised here.
        """
        if threading.get_ident() == self._thread:
            return job()
        future: Future = Future()
        self._waiting.put((job, future))
        while not future.done():
            if not self._is_alive():
                raise DoRAError("the generation thread died.")
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                continue
        return future.result()

    def run(self) -> None:
        """Run all functions that wait."""
        while True:
            try:
                job, future = self._waiting.get_nowait()
            except Empty:
                return
            with Kept(future.set_exception):
                future.set_result(job())
