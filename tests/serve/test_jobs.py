import threading
import time

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.serve.jobs import Jobs, Kept


def test_a_job_runs_in_the_thread_that_runs_jobs() -> None:
    done = threading.Event()
    jobs = Jobs(lambda: True)

    def serve() -> None:
        jobs.own()
        while not done.is_set():
            jobs.run()
            time.sleep(0.001)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert jobs.call(threading.get_ident) == thread.ident
        assert jobs.call(lambda: jobs.call(threading.get_ident)) == thread.ident
        with pytest.raises(KeyError, match="nothing"):
            jobs.call(lambda: {}["nothing"])
        assert jobs.call(lambda: 5) == 5
    finally:
        done.set()
        thread.join()


def test_a_job_for_a_dead_thread_is_an_error() -> None:
    with pytest.raises(DoRAError, match="died"):
        Jobs(lambda: False).call(lambda: 5)


def test_an_exception_is_handed_over_and_an_interrupt_is_not() -> None:
    kept: list[Exception] = []
    error = ValueError("a")
    with Kept(kept.append):
        raise error
    assert kept == [error]
    with pytest.raises(KeyboardInterrupt), Kept(kept.append):
        raise KeyboardInterrupt
    assert len(kept) == 1
