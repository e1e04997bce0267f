"""Heartbeats between processes, tested with sockets of a single process."""

import socket
import threading
from collections.abc import Iterator

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.train.peers import PeerWatch, peer_timeout


@pytest.fixture
def channels() -> Iterator[list[socket.socket]]:
    made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
    for channel in made:
        channel.bind(("127.0.0.1", 0))
    yield made
    for channel in made:
        channel.close()


class Ring:
    """Watches of several ranks, and the silent ranks that each reports."""

    def __init__(self, channels: list[socket.socket], seconds: float) -> None:
        self.complaints: list[tuple[int, int]] = []
        self.complained = threading.Event()
        self.watches = [
            PeerWatch(
                channel,
                rank=rank,
                addresses=[other.getsockname() for other in channels],
                token="t",
                seconds=seconds,
                on_silence=lambda silent, _, rank=rank: self._note(rank, silent),
            )
            for rank, channel in enumerate(channels)
        ]

    def _note(self, rank: int, silent: int) -> None:
        self.complaints.append((rank, silent))
        self.complained.set()


def test_a_silent_process_is_named(channels: list[socket.socket]) -> None:
    ring = Ring(channels, seconds=0.5)
    with ring.watches[0]:
        # Rank 1 sends once and stops; rank 2 never sends.
        channels[1].sendto(b'["t", 1, "alive"]', channels[0].getsockname())
        assert ring.complained.wait(30)
    assert ring.complaints == [(0, 1)]


def test_a_process_that_announces_its_end_is_not_missed(
    channels: list[socket.socket],
) -> None:
    ring = Ring(channels[:2], seconds=0.3)
    with ring.watches[0]:
        with ring.watches[1]:
            pass
        assert not ring.complained.wait(1)


def test_a_process_without_a_socket_has_ended(channels: list[socket.socket]) -> None:
    ring = Ring(channels, seconds=60)
    assert ring.watches[0].ended() == []
    channels[2].close()
    assert ring.watches[0].ended() == [2]


def test_invalid_messages_are_ignored(channels: list[socket.socket]) -> None:
    ring = Ring(channels[:2], seconds=0.3)
    with ring.watches[0]:
        for text in (
            b'["x", 1, "alive"]',
            b"[",
            b"[1]",
            b'["t", "1", "alive"]',
            b"\xff",
        ):
            channels[2].sendto(text, channels[0].getsockname())
        assert not ring.complained.wait(1)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "soon"])
def test_the_limit_must_be_a_number_of_seconds(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("MLX_DORA_PEER_TIMEOUT", text)
    with pytest.raises(DoRAError, match="MLX_DORA_PEER_TIMEOUT must be"):
        peer_timeout()
