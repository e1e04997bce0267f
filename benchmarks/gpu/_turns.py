"""Several processes compile at the same time and measure one after another.

    python _turns.py READY_BY LIMIT NAME ...

MLX compiles custom kernels anew in each process, for seconds each, so the processes of
a call start together. Each calls `ready` when all is compiled and waits for its turn.
This script gives the turns, in the order of readiness: READY_BY seconds after the start
it stops waiting for the others, and LIMIT seconds after a turn's start it goes on.
"""

import os
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("TURN_FOLDER", "turns"))
NAME = os.environ.get("TURN", "")
_PAUSE = 0.05


def ready() -> None:
    """Wait for this process's turn; returns at once if the environment names none."""
    if not NAME:
        return
    _mark("ready")
    while not (FOLDER / f"{NAME}.go").exists():
        time.sleep(_PAUSE)


def done() -> None:
    """End this process's turn."""
    if NAME:
        _mark("done")


def _mark(state: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{NAME}.{state}").touch()


def _has(name: str, *states: str) -> bool:
    return any((FOLDER / f"{name}.{state}").exists() for state in states)


def give(ready_by: float, limit: float, names: list[str]) -> None:
    """Give each named process its turn; ``NAME.dead`` says that a process ended."""
    start, waiting = time.monotonic(), list(names)
    while waiting:
        waiting = [name for name in waiting if not _has(name, "dead")]
        here = [name for name in waiting if _has(name, "ready")]
        if not here:
            if time.monotonic() - start > ready_by:
                break
            time.sleep(_PAUSE)
            continue
        name, began = here[0], time.monotonic()
        waiting.remove(name)
        (FOLDER / f"{name}.go").touch()
        while not _has(name, "done", "dead") and time.monotonic() - began < limit:
            time.sleep(_PAUSE)
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    if waiting:
        print("never ready:", *waiting, flush=True)


if __name__ == "__main__":
    give(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
