"""Starts processes of MLX's ring backend on this machine."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.processes import ROOT, Process


def free_ports(count: int) -> list[int]:
    """Consecutive ports that nothing listens on."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            taken = []
            for other in range(port + 1, port + count):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", other)) == 0:
                        taken.append(other)
        if not taken and port + count < 65_000:
            return list(range(port, port + count))


def launch(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run ``mlx.launch -n 2 --backend ring -- python ARGUMENTS`` to completion."""
    command = [
        Path(sys.executable).parent / "mlx.launch",
        *("-n", "2", "--backend", "ring", "--starting-port", str(free_ports(2)[0])),
        *("--", sys.executable, *arguments),
    ]
    reading, writing = os.pipe()  # mlx.launch needs an open stdin while it runs
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            stdin=reading,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        os.close(reading)
        os.close(writing)


@contextmanager
def started(folder: Path, *commands: Sequence[str]) -> Iterator[list[Process]]:
    """Start one process per command, as ``mlx.launch`` does; host file in `folder`."""
    hosts = folder / f"hosts-{len(list(folder.iterdir()))}.json"
    ports = free_ports(len(commands))
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    processes = [
        Process(
            command,
            env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
        )
        for rank, command in enumerate(commands)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def both(work: Path, first: list[str], second: list[str]) -> list[tuple[int, str]]:
    """Exit code and errors of two processes of a training."""
    with started(work, first, second) as processes:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    return [
        (process.wait(), text) for process, text in zip(processes, errors, strict=True)
    ]
