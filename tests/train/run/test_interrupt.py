import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from mlx_dora.train.run.interrupt import delayed_interrupt
from tests.train.conftest import EXAMPLES
from tests.train.saved import log

Run = Callable[..., Any]
BUSY = 4_000_000  # iterations of about a second in C, in which no Python code runs


def interrupt_while_busy(events: list[str], times: int) -> None:
    """Interrupt this thread `times` times while it computes outside Python."""

    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)  # equal signals on their way count once

    timer = threading.Timer(0.05, send)
    timer.start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", BUSY)
    timer.join()
    events.append("computed")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    logger = logging.getLogger("mlx_dora.train.run.interrupt")
    monkeypatch.setattr(logger, "warning", lambda *_: found.append("acknowledged"))
    return found


def test_an_interrupt_is_acknowledged_while_mlx_computes(events: list[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with delayed_interrupt() as stopped:
        interrupt_while_busy(events, 1)
        assert stopped() == signal.SIGINT
    assert events == ["acknowledged", "computed"]
    assert signal.getsignal(signal.SIGINT) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_two_interrupts_in_one_computation_stop_at_once(events: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt), delayed_interrupt():
        interrupt_while_busy(events, 2)
    assert events[0] == "acknowledged"
    assert events.count("acknowledged") == 1


def test_an_interrupt_in_the_first_validation_trains_no_step_and_saves_nothing(
    run: Run, tmp_path: Any
) -> None:
    phases: list[str] = []

    def progress(phase: str, total: int, done: int) -> None:
        phases.append(phase)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run("a", valid=EXAMPLES, progress=progress)
    assert phases == ["validate"]  # the first of three batches
    assert not (tmp_path / "a").exists()


def test_an_interrupt_in_a_later_validation_saves_and_resumes_to_the_same_log(
    run: Run, tmp_path: Any
) -> None:
    settings = {"valid": EXAMPLES, "iters": 4, "steps_per_eval": 2}
    phases: list[str] = []

    def progress(phase: str, total: int, done: int) -> None:
        phases.append(phase)
        if phases[-2:] == ["train", "validate"]:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run("a", progress=progress, **settings)
    assert phases[-1] == "validate"
    assert phases.count("train") == 2
    assert (tmp_path / "a" / "adapters.safetensors").exists()
    run("a", resume=True, **settings)
    run("b", **settings)

    def losses(name: str) -> list[tuple[int, Any]]:
        return [(row["step"], row.get("val_loss")) for row in log(tmp_path / name)]

    validated = [pair for pair in losses("a") if pair[1] is not None]
    assert validated == [pair for pair in losses("b") if pair[1] is not None]


def test_a_run_logs_its_parameters_and_its_start(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlx_dora.train")
    _, report = run("a", keys=("self_attn.q_proj",))
    assert report.first_step == 0
    trained = f"{report.trainable_parameters:,}"
    assert any(
        message.startswith(f"Trainable: {trained} of ") and "in 2 modules" in message
        for message in caplog.messages
    )
    _, report = run("a", keys=("self_attn.q_proj",), resume=True, iters=7)
    assert report.first_step == 5
    assert "Resuming from step 5 of 7" in caplog.messages
