"""A watch over the other processes of a training, which may stop without ending.

MLX's collective operations wait without end for a process that is stopped, swapped out
or unreachable. Each process therefore sends the others a datagram now and then, from a
thread of its own, and ends when one has been silent for too long. A long step is no
silence: the thread goes on beside it.
"""

import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.train.group import share, together

TIMEOUT_VARIABLE = "MLX_DORA_PEER_TIMEOUT"
DEFAULT_TIMEOUT = 120.0
"""Seconds of silence after which a process counts as stopped."""

logger = logging.getLogger(__name__)

Address = tuple[str, int]


def peer_timeout() -> float:
    """Seconds from ``MLX_DORA_PEER_TIMEOUT``; 0 switches the watch off.

    Raises:
        DoRAError: If the variable is not such a number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else DEFAULT_TIMEOUT
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise DoRAError(
            f"{TIMEOUT_VARIABLE} must be a number of seconds (0: no limit), got "
            f"{text!r}."
        )
    return seconds


@contextmanager
def watched_peers(group: mx.distributed.Group) -> Iterator[None]:
    """End this process with one line and code 1 if another falls silent.

    A process that was never heard of (a firewall may drop datagrams) is not watched.

    Args:
        group: The processes; all of them call this.
    """
    seconds = 0.0
    with together(group):
        if group.size() > 1:
            seconds = peer_timeout()
    # The first process's limit holds for all, so that all take part or none.
    seconds = share(seconds, group)
    if not seconds:
        yield
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        own = _own_host(group.rank())
        channel.bind((own, 0))
        address = channel.getsockname()[:2]
        addresses = [share(address, group, source=r) for r in range(group.size())]
        token = share(secrets.token_hex(16), group)
        watch = PeerWatch(
            channel,
            rank=group.rank(),
            addresses=[(str(host), int(port)) for host, port in addresses],
            token=token,
            seconds=seconds,
            on_silence=_end,
        )
        with watch:
            yield


class PeerWatch:
    """Sends signs of life to other processes, and misses theirs.

    Args:
        channel: A bound datagram socket.
        rank: This process's place in `addresses`.
        addresses: Of every process.
        token: What all of them know and others do not.
        seconds: Longest silence.
        on_silence: Called with the rank of a silent process and the seconds.
    """

    def __init__(
        self,
        channel: socket.socket,
        *,
        rank: int,
        addresses: Sequence[Address],
        token: str,
        seconds: float,
        on_silence: Callable[[int, float], None],
    ) -> None:
        self._channel = channel
        self._others = {r: a for r, a in enumerate(addresses) if r != rank}
        self._token = token
        self._rank = rank
        self._seconds = seconds
        self._interval = min(seconds / 8, 5.0)
        self._on_silence = on_silence
        self._heard: dict[int, float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PeerWatch":
        self._channel.settimeout(self._interval)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._channel.sendto(b"", self._channel.getsockname())  # wakes our own thread
        self._thread.join()
        self._send("end")

    def _run(self) -> None:
        sent = looked = time.monotonic()
        self._send("alive")
        while not self._is_over.is_set():
            self._receive()
            now = time.monotonic()
            if now - looked > self._seconds / 2:
                # It was this process that stood still, and with it its ears.
                self._heard = dict.fromkeys(self._heard, now)
            looked = now
            if now - sent >= self._interval:
                self._send("alive")
                sent = now
            for rank, last in self._heard.items():
                if now - last > self._seconds:
                    self._on_silence(rank, self._seconds)
                    return

    def _send(self, word: str) -> None:
        message = json.dumps([self._token, self._rank, word]).encode()
        for address in self._others.values():
            try:
                self._channel.sendto(message, address)
            except OSError as error:
                logger.info("no sign of life could be sent to %s: %s", address, error)

    def _receive(self) -> None:
        try:
            message = self._channel.recv(1024)
        except OSError:  # nothing came in time, or an earlier one was not delivered
            return
        try:
            token, rank, word = json.loads(message)
        except (ValueError, TypeError, RecursionError):
            return
        if token != self._token or type(rank) is not int or rank not in self._others:
            return
        if word == "end":
            self._heard.pop(rank, None)
        else:
            self._heard[rank] = time.monotonic()


def _own_host(rank: int) -> str:
    """The address at which the others reach this process, as ``mlx.launch`` says it."""
    hosts = os.environ.get("MLX_HOSTFILE")
    try:
        listed = json.loads(Path(hosts).read_text()) if hosts else []
        return str(listed[rank][0]).rpartition(":")[0] or "127.0.0.1"
    except (OSError, ValueError, LookupError, TypeError):
        pass
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _end(rank: int, seconds: float) -> None:
    # The main thread waits inside MLX and cannot be interrupted.
    sys.stderr.write(
        f"Error: process {rank} of this training has given no sign of life for "
        f"{seconds:g} seconds (stopped, or its machine is unreachable); --resume goes "
        f"on from the last checkpoint ({TIMEOUT_VARIABLE} sets the limit).\n"
    )
    sys.stderr.flush()
    os._exit(1)
