"""Processes of this interpreter that start in milliseconds, for tests that kill them.

Importing mlx_lm takes two seconds. A `Process` is a fork of a process that has done it.
Where the imports, or the environment while they run, are what is tested, use
`subprocess`.
"""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import IO, Any

ROOT = Path(__file__).parents[1]


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    command = [sys.executable, "-m", "tests.fork_server", str(number)]
    server = subprocess.Popen(command, cwd=ROOT, stdin=DEVNULL, pass_fds=[number])
    server.returncode = 0  # it ends with our end of the channel; nobody waits for it
    theirs.close()
    return ours


class Process:
    """``python WORDS``, with what tests use of `subprocess.Popen`, as text.

    Attributes:
        pid: Number of the process.
        returncode: Exit code, negative for a signal; None before it was waited for.
        stdout: Standard output where PIPE was asked for.
        stderr: Standard error where PIPE was asked for.
    """

    def __init__(
        self,
        words: Sequence[object],
        *,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
        input: str = "",
        stdout: int = PIPE,
        stderr: int = PIPE,
    ) -> None:
        self.words = [str(word) for word in words]
        request = {
            "words": self.words,
            "folder": str(cwd),
            "environment": dict(os.environ if env is None else env),
        }
        stdin, writer = os.pipe()
        theirs = [stdin]
        self.stdout = _stream(stdout, theirs)
        self.stderr = _stream(stderr, theirs)
        status, writing = os.pipe()
        theirs.append(writing)
        socket.send_fds(_server(), [json.dumps(request).encode() + b"\n"], theirs)
        for number in theirs:
            os.close(number)
        with os.fdopen(writer, "w") as pipe:
            pipe.write(input)
        self._status = os.fdopen(status, "rb", buffering=0)
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Exit code, once the process has ended.

        Raises:
            subprocess.TimeoutExpired: If it runs for longer.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.words, timeout or 0)
            status = int(self._status.readline())
            self.returncode = os.waitstatus_to_exitcode(status)
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        """Exit code, or None while the process runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left of output and errors, once the process has ended.

        Raises:
            subprocess.TimeoutExpired: If it runs for longer; it is killed then.
        """
        streams = [s for s in (self.stdout, self.stderr) if s and not s.closed]
        with ThreadPoolExecutor(2) as readers:
            texts = {stream: readers.submit(stream.read) for stream in streams}
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        for stream in streams:
            stream.close()
        output, errors = (
            texts[stream].result() if stream in texts else ""
            for stream in (self.stdout, self.stderr)
        )
        return output, errors

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process is known to have ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended just now
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


def run(
    words: Sequence[object], *, timeout: float = 300, check: bool = False, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` and capture its output, like `subprocess.run`."""
    process = Process(words, **more)
    output, errors = process.communicate(timeout)
    code = process.wait()
    done = subprocess.CompletedProcess(process.words, code, output, errors)
    if check:
        done.check_returncode()
    return done


def _stream(kind: int, theirs: list[int]) -> IO[str] | None:
    """Append the other side's descriptor; return our end of a pipe, if it is one."""
    if kind == DEVNULL:
        theirs.append(os.open(os.devnull, os.O_RDWR))
        return None
    if kind != PIPE:
        theirs.append(os.dup(kind))
        return None
    reader, writer = os.pipe()
    theirs.append(writer)
    return os.fdopen(reader, encoding="utf-8")
