"""Watches the other processes of a training, which may hang without ending.

MLX's collective operations wait forever for a process that is stopped, swapped out or
unreachable. Therefore each process periodically sends the others a datagram, from a
separate thread, and exits when another process has been silent for too long. A long
step does not count as silence, because the thread keeps running during the step.
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

_PROBES = 3
_PROBE_PAUSE = 0.1  # seconds

logger = logging.getLogger(__name__)

Address = tuple[str, int]


def peer_timeout() -> float:
    """Seconds from ``MLX_DORA_PEER_TIMEOUT``; 0 switches the watch off.

    Raises:
        DoRAError: If the variable is not a finite number of at least 0.
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
def watched_peers(group: mx.distributed.Group) -> Iterator[Callable[[], list[int]]]:
    """Exit with a one-line error and code 1 if another process falls silent.

    A process that has never sent a datagram (a firewall may drop them) is not watched.

    Args:
        group: The processes; all of them must make this call.

    Yields:
        A function that returns the ranks of processes that have ended, as far as their
        machines tell; see `PeerWatch.ended`.
    """
    seconds = 0.0
    with together(group):
        if group.size() > 1:
            seconds = peer_timeout()
    # All use the first process's limit, so that all take part or none does.
    seconds = share(seconds, group)
    if not seconds:
        yield list
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
            yield watch.ended


class PeerWatch:
    """Sends heartbeats to the other processes, and notices when theirs stop.

    Args:
        channel: A bound datagram socket.
        rank: Index of this process in `addresses`.
        addresses: Address of every process.
        token: Secret that only these processes share.
        seconds: Longest allowed silence, in seconds.
        on_silence: Called with the rank of a silent process and `seconds`.
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
        self._channel.sendto(b"", self._channel.getsockname())  # wakes the thread
        self._thread.join()
        self._send("end")

    def ended(self) -> list[int]:
        """Return the ranks of processes whose machines refuse datagrams for them.

        A process that was killed no longer has a socket. A machine that is unreachable
        gives no answer, so its processes are not listed.
        """
        refused = []
        for rank, address in self._others.items():
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                try:
                    probe.connect(address)
                    for _ in range(_PROBES):  # the refusal of one fails the next
                        probe.send(b"")
                        time.sleep(_PROBE_PAUSE)
                except OSError:
                    refused.append(rank)
        return refused

    def _run(self) -> None:
        sent = checked = time.monotonic()
        self._send("alive")
        while not self._is_over.is_set():
            self._receive()
            now = time.monotonic()
            if now - checked > self._seconds / 2:
                # This process itself was suspended and could not receive.
                self._heard = dict.fromkeys(self._heard, now)
            checked = now
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
                logger.info("no heartbeat could be sent to %s: %s", address, error)

    def _receive(self) -> None:
        try:
            message = self._channel.recv(1024)
        except OSError:  # timeout, or an undelivered earlier datagram
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
    """The address of this process, from the host file of ``mlx.launch`` if set."""
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
        f"{seconds:g} seconds (stopped, or its machine is unreachable); --resume "
        f"continues from the last checkpoint ({TIMEOUT_VARIABLE} sets the limit).\n"
    )
    sys.stderr.flush()
    os._exit(1)
