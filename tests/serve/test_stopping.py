"""Servers of several adapters that are full, stop, or do not start."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.serve.client import Server

PROMPT = {"prompt": "the quick fox", "max_tokens": 6}


def test_too_many_requests_are_answered_429_and_sigterm_drains(
    tiny_base: Path, named_adapters: dict[str, Path]
) -> None:
    server = Server(
        *("--model", tiny_base, "--adapter", f"ada={named_adapters['ada']}"),
        *("--decode-concurrency", 2, "--prompt-concurrency", 2, "--max-queue", 1),
    ).ready()
    never = {"2": -1e5}  # the end of the text
    long = {"model": "ada", "prompt": "fox", "max_tokens": 600, "logit_bias": never}
    answers: list[tuple[int, Any]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(server.ask(long)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for _ in range(200):
        if "requests_admitted 3" in server.get("/metrics")[1]:
            break
        time.sleep(0.02)
    status, answer = server.ask({**PROMPT, "model": "ada"})
    assert (status, "--max-queue" in answer["error"]) == (429, True)

    server.process.send_signal(signal.SIGTERM)
    health = server.get("/health")
    for _ in range(200):
        if health[0] == 503:
            break
        time.sleep(0.02)
        health = server.get("/health")
    assert health == (503, '{"status": "stopping"}')
    assert server.ask({**PROMPT, "model": "ada"})[0] == 503
    for thread in threads:
        thread.join()
    assert [status for status, _ in answers] == [200] * 3
    lengths = {answer["usage"]["completion_tokens"] for _, answer in answers}
    assert lengths == {600}
    errors = server.process.communicate(timeout=30)[1]
    assert server.process.returncode == 0, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "ada"], "must be NAME=FOLDER"),
        (["--adapter", "a b=x"], "an adapter's name must have"),
        (["--adapter", "a=x", "a=y"], "names 'a' twice"),
        (["--adapter", "a=x", "b=y", "--max-adapters", "1"], "--max-adapters allows 1"),
        (["--adapter", "a=x", "--adapter-path", "y"], "cannot be combined"),
        (["--max-queue", "5"], "needs --adapter"),
        (["--adapter", "a=no/such/folder"], "no/such/folder"),
    ],
)
def test_a_wrong_command_line_is_a_one_line_error(
    words: list[str], message: str, tiny_base: Path
) -> None:
    process = Server("--model", tiny_base, *words).process
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert message in errors.strip().splitlines()[-1]
