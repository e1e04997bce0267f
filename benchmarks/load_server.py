"""Ask a server of eight adapters from many clients, and check every answer.

    python benchmarks/load_server.py [--clients 64] [--seconds 120] [--adapters FOLDER]

Each adapter (ranks 4 to 64, DoRA and LoRA) is trained to answer "I am NAME." The
clients, threads of this process on the loopback interface, each ask a random adapter,
half of them as a stream, and send the next question when the answer is complete. An
answer with another name is a wrong adapter, and any status but 200 an error; either
makes the exit code 1. The result is one JSON line with the times from question to
complete answer. The model is the demo's SmolLM2-135M.
"""

import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import _harness as bench
import click
import numpy as np
from _named_adapters import QUESTIONS, is_answer, make_adapters

from mlx_dora.demo.model import demo_model

CHAT = "/v1/chat/completions"


@dataclass
class Tally:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)


def ask(port: int, name: str, question: str, stream: bool) -> str:
    """Return an adapter's answer.

    Raises:
        RuntimeError: If the status is not 200.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = {
        "model": name,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 16,
        "stream": stream,
    }
    try:
        connection.request("POST", CHAT, json.dumps(body).encode())
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {text[:200]}")
    if not stream:
        return json.loads(text)["choices"][0]["message"]["content"] or ""
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    return "".join(delta.get("content", "") for delta in deltas)


def client(number: int, port: int, names: list[str], end: float, tally: Tally) -> None:
    chance = random.Random(number)
    while (start := time.monotonic()) < end:
        name, question = chance.choice(names), chance.choice(QUESTIONS)
        try:
            text = ask(port, name, question, chance.random() < 0.5)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            tally.errors.append(f"{type(error).__name__}: {error}")
            continue
        tally.seconds.append(time.monotonic() - start)
        tally.served[name] += 1
        if not is_answer(text, name):
            tally.wrong.append(f"{name}: {text!r}")


@contextmanager
def serving(base: Path, adapters: dict[str, Path]) -> Iterator[int]:
    """Run a server process, and yield its port when it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "mlx_dora", "server", "--model", str(base)]
    for name, path in adapters.items():
        words += ["--adapter", f"{name}={path}"]
    words += ["--port", str(port), "--log-level", "WARNING"]
    process = subprocess.Popen(words)
    try:
        while not is_ready(port):
            if process.poll() is not None:
                raise click.ClickException("the server does not start")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        click.echo(f"server: exit code {process.wait(timeout=60)}", err=True)


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def report(tally: Tally, clients: int, seconds: float, model: str) -> None:
    p50, p95 = np.percentile(tally.seconds, [50, 95]) if tally.seconds else (0, 0)
    facts = {
        "case": f"{model} server, 8 adapters",
        "clients": clients,
        "seconds": seconds,
        "answers": len(tally.seconds),
        "answers_per_second": round(len(tally.seconds) / seconds, 2),
        "errors": len(tally.errors),
        "wrong": len(tally.wrong),
        "p50_s": round(float(p50), 3),
        "p95_s": round(float(p95), 3),
        "by_adapter": dict(sorted(tally.served.items())),
    }
    click.echo(json.dumps({**facts, **bench.describe_machine()}))
    for line in (tally.errors + tally.wrong)[:5]:
        click.echo(line, err=True)


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@click.option("--clients", type=int, default=64)
@click.option("--seconds", type=float, default=120.0)
@click.option("--model", type=click.Path(path_type=Path), help="A model folder.")
@click.option("--adapters", type=click.Path(path_type=Path), help="Keep them here.")
@click.option("--num-layers", type=int, default=4, help="Blocks that are adapted.")
def main(
    clients: int,
    seconds: float,
    model: Path | None,
    adapters: Path | None,
    num_layers: int,
) -> None:
    base = model or demo_model()
    with tempfile.TemporaryDirectory() as aside:
        paths = make_adapters(base, adapters or Path(aside), num_layers=num_layers)
        tally = Tally()
        with serving(base, paths) as port:
            end = time.monotonic() + seconds
            threads = [
                threading.Thread(
                    target=client, args=(number, port, list(paths), end, tally)
                )
                for number in range(clients)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    report(tally, clients, seconds, base.name)
    if tally.errors or tally.wrong or not tally.seconds:
        raise click.ClickException("there were errors or wrong answers")


if __name__ == "__main__":
    main()
