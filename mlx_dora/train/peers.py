"""Watches the other processes of a training, which may end or hang.

MLX's collective operations wait forever for a process that is stopped, swapped out or
unreachable; and where a process has been killed, MLX notices that at the first message,
but may wait forever at the next. Therefore each process has a connection of its own to
every other one, which a separate thread watches. It sends a byte periodically, and ends
this process when a connection has been closed, or another process has been silent for
too long. A long step does not count as silence, because the thread keeps running.
"""

import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.train.group import SharedError, share, together

TIMEOUT_VARIABLE = "MLX_DORA_PEER_TIMEOUT"
DEFAULT_TIMEOUT = 120.0
"""Seconds of silence after which a process counts as stopped."""

PATIENCE = 5.0
"""Seconds that this process has to end by itself after another one has ended."""

_CONNECTING = 5.0  # seconds
_ALIVE, _END = b".", b"e"
# Errors that all processes raise together, each after its last message.
_SHARED = (SharedError, KeyboardInterrupt)

logger = logging.getLogger(__name__)

Address = tuple[str, int]
OnLoss = Callable[[int, float | None], None]
"""Called with the rank of a process, and the seconds of its silence or None."""


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
    """Exit with a one-line error and code 1 if another process ends or falls silent.

    A process to which no connection can be made (a firewall may forbid it) is not
    watched, which is logged.

    Args:
        group: The processes; all of them must make this call.

    Yields:
        A function that returns the ranks of processes that have ended; see
        `PeerWatch.ended`.
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
    with ExitStack() as stack:
        own = _own_host(group.rank())
        listener = stack.enter_context(socket.create_server((own, 0)))
        address = listener.getsockname()[:2]
        addresses = [share(address, group, source=r) for r in range(group.size())]
        token = share(secrets.token_hex(16), group)
        channels = connect(
            listener,
            rank=group.rank(),
            addresses=[(str(host), int(port)) for host, port in addresses],
            token=token,
        )
        watch = PeerWatch(channels, seconds=seconds, on_loss=_end)
        with watch:
            yield watch.ended


def connect(
    listener: socket.socket, *, rank: int, addresses: Sequence[Address], token: str
) -> dict[int, socket.socket]:
    """Connect this process with every other one, the higher rank to the lower.

    Args:
        listener: Listening socket of this process.
        rank: Rank of this process, its index in `addresses`.
        addresses: Address of the listener of every process.
        token: Secret that only these processes share.

    Returns:
        Sockets by rank, without those that could not be connected.
    """
    channels: dict[int, socket.socket] = {}
    for other, address in enumerate(addresses[:rank]):
        try:
            channel = socket.create_connection(address, _CONNECTING)
            channel.sendall(json.dumps([token, rank]).encode() + b"\n")
            channels[other] = channel
        except OSError as error:
            logger.info("no connection to %s: %s", address, error)
    expected, deadline = len(addresses) - 1, time.monotonic() + 2 * _CONNECTING
    while len(channels) < expected and (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            channel, _ = listener.accept()
        except OSError:  # timeout
            break
        channel.settimeout(_CONNECTING)
        other = _greeting(channel, token)
        if other in channels or other not in range(rank + 1, len(addresses)):
            channel.close()
        else:
            channels[other] = channel
    if missing := sorted({*range(len(addresses))} - {rank, *channels}):
        logger.warning(
            "process %s cannot be watched from process %d (is there a firewall?): if "
            "it stops, this process may wait forever",
            ", ".join(map(str, missing)),
            rank,
        )
    return channels


def _greeting(channel: socket.socket, token: str) -> int:
    """Return the rank that a connected process names; -1 if it is none of ours."""
    try:
        with channel.makefile("rb") as stream:
            given, rank = json.loads(stream.readline(256))
    except (OSError, ValueError, TypeError, RecursionError):
        return -1
    return rank if given == token and type(rank) is int else -1


class PeerWatch:
    """Sends signs of life to other processes, and notices when theirs stop.

    Args:
        channels: Connected sockets by rank, which this object closes.
        seconds: Longest allowed silence, in seconds.
        on_loss: Called once, from another thread, when a process has been silent for
            `seconds`, or `patience` after one has ended.
        patience: Seconds between the end of another process and the call.
    """

    def __init__(
        self,
        channels: Mapping[int, socket.socket],
        *,
        seconds: float,
        on_loss: OnLoss,
        patience: float = PATIENCE,
    ) -> None:
        self._channels = dict(channels)
        self._seconds, self._patience = seconds, patience
        self._interval = min(seconds / 8, 5.0)
        self._on_loss = on_loss
        self._heard: dict[int, float] = {}
        self._lost: dict[int, float] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PeerWatch":
        self._waking, self._woken = socket.socketpair()
        self._heard = dict.fromkeys(self._channels, time.monotonic())
        for channel in self._channels.values():
            channel.setblocking(False)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._waking.close()
        self._thread.join()
        self._woken.close()
        if kind is None or issubclass(kind, _SHARED):
            self._send(_END)  # otherwise, the others must not wait for this process
        for channel in self._channels.values():
            channel.close()

    def ended(self, within: float = 1.0) -> list[int]:
        """Return the ranks of processes that have ended, the first one first.

        Without warning: a process that completes its training says so.

        Args:
            within: Seconds to wait for the first, which MLX may notice earlier.
        """
        deadline = time.monotonic() + within
        while not self._lost and time.monotonic() < deadline:
            time.sleep(0.01)
        return sorted(self._lost, key=lambda rank: self._lost[rank])

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ, None)
            for rank, channel in self._channels.items():
                selector.register(channel, selectors.EVENT_READ, rank)
            sent = checked = time.monotonic()
            self._send(_ALIVE)
            while True:
                ready = selector.select(min(self._interval, self._patience))
                now = time.monotonic()
                for key, _ in ready:
                    if key.data is None:
                        return
                    if not self._receive(key.data, now):
                        selector.unregister(key.fileobj)
                if now - checked > self._seconds / 2:
                    # This process itself was suspended and could not receive.
                    self._heard = dict.fromkeys(self._heard, now)
                checked = now
                if now - sent >= self._interval:
                    self._send(_ALIVE)
                    sent = now
                if self._complains(now):
                    return

    def _complains(self, now: float) -> bool:
        """Whether a process was lost, which is then reported."""
        if self._lost:
            rank, since = min(self._lost.items(), key=lambda item: item[1])
            if now - since >= self._patience:
                self._on_loss(rank, None)
                return True
        for rank, last in self._heard.items():
            if now - last > self._seconds:
                self._on_loss(rank, self._seconds)
                return True
        return False

    def _send(self, word: bytes) -> None:
        for rank, channel in self._channels.items():
            try:
                channel.send(word)
            except OSError as error:  # its buffer is full, or it has ended
                logger.debug("process %d takes no sign of life: %s", rank, error)

    def _receive(self, rank: int, now: float) -> bool:
        """Read what a process has sent; return whether it may send more."""
        try:
            content = self._channels[rank].recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            content = b""
        if content and _END not in content:
            self._heard[rank] = now
            return True
        self._heard.pop(rank, None)
        if not content:
            self._lost[rank] = now
        return False


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


def _end(rank: int, silence: float | None) -> None:
    # The main thread waits inside MLX and cannot be interrupted.
    what, limit = "has ended: see its output", ""
    if silence is not None:
        what = (
            f"has given no sign of life for {silence:g} seconds (stopped, or its "
            "machine is unreachable)"
        )
        limit = f" ({TIMEOUT_VARIABLE} sets the limit)"
    sys.stderr.write(
        f"Error: process {rank} of this training {what}; --resume continues from the "
        f"last checkpoint{limit}.\n"
    )
    sys.stderr.flush()
    os._exit(1)
