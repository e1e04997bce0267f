"""A server process, and requests to it, for tests."""

import http.client
import json
import os
import socket
import time
from subprocess import DEVNULL
from typing import Any

from tests.processes import Process

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD = {"prompt": "the quick fox", "max_tokens": 4}


class Server:
    """A server process, and methods to send requests to it."""

    def __init__(self, *args: object, program: str | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        start = ["-c", program] if program else ["-m", "mlx_dora", "server"]
        words = [*start, *args, "--port", self.port]
        self.process = Process(words, env=ENVIRONMENT, stdout=DEVNULL)

    def ready(self) -> "Server":
        """Wait until the port answers."""
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return self
            except ConnectionError:
                assert self.process.poll() is None, self.process.communicate()[1]
                time.sleep(0.1)
        raise AssertionError("the server does not start")

    def send(self, content: bytes, path: str, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, content, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text)

    def ask(self, body: Any, path: str = COMPLETIONS) -> tuple[int, Any]:
        return self.send(json.dumps(body).encode(), path)

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def text(self, **body: Any) -> str:
        status, answer = self.ask({**GOOD, **body})
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def stop(self) -> str:
        self.process.terminate()
        return self.process.communicate(timeout=30)[1]
