"""Runs a script under an interpreter that has the peers (torch, peft and others).

That is the one ``MLX_DORA_PEERS_PYTHON`` names, or ours with the extra ``peers``.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.hosts import version_in

HERE = Path(__file__).parent


@cache
def peers_python(*modules: str) -> str:
    """An interpreter that imports `modules`; skips the test where there is none."""
    python = os.environ.get("MLX_DORA_PEERS_PYTHON", sys.executable)
    code = f"import importlib.util as u, sys; sys.exit({list(modules)!r} != " \
           f"[m for m in {list(modules)!r} if u.find_spec(m)])"  # fmt: skip
    if subprocess.run([python, "-c", code], env=_environment()).returncode:
        pytest.skip(
            f"{python} lacks one of {', '.join(modules)}: install the extra peers, or "
            "name an interpreter that has them in MLX_DORA_PEERS_PYTHON"
        )
    return python


def run_peer(
    script: str,
    name: str,
    folder: Path,
    job: dict[str, Any],
    given: dict[str, mx.array],
) -> dict[str, mx.array]:
    """Do one job of a peer's script, in `folder`."""
    python = peers_python("torch", "peft", "transformers")
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    mx.save_safetensors(str(folder / "in.safetensors"), given)
    done = subprocess.run(
        [python, str(HERE / script), name, str(folder)],
        capture_output=True, text=True, env=_environment(), timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = mx.load(str(folder / "out.safetensors"))
    assert isinstance(found, dict)
    return found


def peer_version(package: str) -> str:
    """The version of a package that the peers' interpreter has."""
    return version_in(peers_python(package), package)


def _environment() -> dict[str, str]:
    ours = ("PYTHONPATH", "LD_PRELOAD")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
