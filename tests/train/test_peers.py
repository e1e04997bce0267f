"""Connections between processes, tested with sockets of a single process."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.train import peers
from mlx_dora.train.group import SharedError
from mlx_dora.train.peers import PeerWatch, connect, peer_timeout

Channels = dict[tuple[int, int], socket.socket]


@pytest.fixture
def channels() -> Iterator[Channels]:
    """Sockets of three processes, by the rank of their owner and of the other."""
    made: Channels = {}
    for first, second in ((0, 1), (0, 2), (1, 2)):
        made[first, second], made[second, first] = socket.socketpair()
    yield made
    for channel in made.values():
        channel.close()


class Ring:
    """Watches of three processes, and the lost ones that each reports."""

    def __init__(self, channels: Channels, seconds: float) -> None:
        self.complaints: list[tuple[int, int, float | None]] = []
        self.complained = threading.Event()
        self.watches = [
            PeerWatch(
                {other: c for (own, other), c in channels.items() if own == rank},
                seconds=seconds,
                on_loss=lambda lost, silence, rank=rank: self._note(
                    rank, lost, silence
                ),
                patience=0.1,
            )
            for rank in range(3)
        ]

    def _note(self, rank: int, lost: int, silence: float | None) -> None:
        self.complaints.append((rank, lost, silence))
        self.complained.set()


def test_a_silent_process_is_named(channels: Channels) -> None:
    ring = Ring(channels, seconds=0.5)
    with ring.watches[0], ring.watches[2]:  # rank 1 is stopped
        assert ring.complained.wait(30)
        time.sleep(0.3)
    assert {(lost, silence) for _, lost, silence in ring.complaints} == {(1, 0.5)}


def test_a_process_that_completes_its_training_is_not_missed(
    channels: Channels,
) -> None:
    ring = Ring(channels, seconds=0.3)
    with ring.watches[0]:
        with ring.watches[1], ring.watches[2]:
            pass
        assert ring.watches[0].ended(within=0) == []
        assert not ring.complained.wait(1)


def test_an_error_of_all_processes_is_the_end_of_each(channels: Channels) -> None:
    ring = Ring(channels, seconds=60)
    with ring.watches[0]:
        with pytest.raises(SharedError), ring.watches[1], ring.watches[2]:
            raise SharedError("all")
        assert not ring.complained.wait(0.5)


@pytest.mark.parametrize("dies", [True, False])
def test_a_process_that_ends_is_named_at_once(channels: Channels, dies: bool) -> None:
    ring = Ring(channels, seconds=60)
    began = time.monotonic()
    with ring.watches[0]:
        if dies:  # as the system closes the sockets of a killed process
            channels[2, 0].close()
        else:
            with pytest.raises(RuntimeError), ring.watches[2]:
                raise RuntimeError("an error of this process alone")
        assert ring.watches[0].ended() == [2]
        assert ring.complained.wait(30)
    assert ring.complaints == [(0, 2, None)]
    assert time.monotonic() - began < 10


def test_the_first_that_ended_is_named(channels: Channels) -> None:
    ring = Ring(channels, seconds=60)
    with ring.watches[0]:
        channels[2, 0].close()
        time.sleep(0.05)
        channels[1, 0].close()
        assert ring.complained.wait(30)
        assert ring.watches[0].ended() == [2, 1]
    assert ring.complaints == [(0, 2, None)]


def listeners(count: int) -> list[socket.socket]:
    return [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]


def test_processes_connect_with_each_other_and_with_no_stranger() -> None:
    made = listeners(3)
    addresses = [listener.getsockname() for listener in made]
    strangers = []
    for text in (b'["x", 2]\n', b"[\n", b"[1]\n", b'["t", "2"]\n', b"\xff\n", b""):
        strangers.append(socket.create_connection(addresses[0]))
        strangers[-1].sendall(text)
        if not text:
            strangers[-1].close()
    with ThreadPoolExecutor(3) as pool:
        channels = list(
            pool.map(
                lambda rank: connect(
                    made[rank], rank=rank, addresses=addresses, token="t"
                ),
                range(3),
            )
        )
    for rank, own in enumerate(channels):
        assert own.keys() == {0, 1, 2} - {rank}
        for other, channel in own.items():
            channel.sendall(bytes([10 * rank + other]))
    for rank, own in enumerate(channels):
        for other, channel in own.items():
            assert channel.recv(9) == bytes([10 * other + rank])
            channel.close()
    for channel in (*strangers, *made):
        channel.close()


def test_a_process_without_a_connection_is_named_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peers, "_CONNECTING", 0.1)
    made = listeners(2)
    addresses = [listener.getsockname() for listener in made]
    made[0].close()
    with caplog.at_level(logging.WARNING):
        assert connect(made[1], rank=1, addresses=addresses, token="t") == {}
    made[1].close()
    assert "process 0 cannot be watched from process 1" in caplog.text


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "soon"])
def test_the_limit_must_be_a_number_of_seconds(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("MLX_DORA_PEER_TIMEOUT", text)
    with pytest.raises(DoRAError, match="MLX_DORA_PEER_TIMEOUT must be"):
        peer_timeout()
