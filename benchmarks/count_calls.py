"""Python calls and files of one forward through a DoRALinear, by `sys.setprofile`.

    python benchmarks/count_calls.py

Counts the functions of mlx_dora alone. "step" is a forward within a training step,
whose norms are held; "alone" computes them too; "eval" has its cache filled.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import mlx_dora
from mlx_dora.layers import DoRALinear, held_norms

PACKAGE = str(Path(mlx_dora.__file__).parent)


def counted(run: Callable[[], Any]) -> list[tuple[str, str]]:
    """File and name of every function of the package that a call enters, in order."""
    calls: list[tuple[str, str]] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            file = code.co_filename.removeprefix(PACKAGE).lstrip("/")
            calls.append((file, code.co_name))

    run()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def forward_calls() -> dict[str, list[tuple[str, str]]]:
    """The calls of a forward by how it is made."""
    layer = DoRALinear.from_base(nn.Linear(64, 32), r=4)
    x = mx.ones((3, 64))
    found = {"alone": counted(lambda: layer(x))}
    with held_norms(layer):
        found["step"] = counted(lambda: layer(x))
    layer.eval()
    return found | {"eval": counted(lambda: layer(x))}


def main() -> None:
    for name, calls in forward_calls().items():
        files = {file for file, _ in calls}
        print(f"{name}: {len(calls)} calls in {len(files)} files")
        for file, function in calls:
            print(f"    {file}: {function}")


if __name__ == "__main__":
    main()
