"""Checks metal/README.md against the code it describes."""

import os
import re
import subprocess
import sys
from pathlib import Path

from mlx_dora.kernels.dispatch import KERNELS

ROOT = Path(__file__).parents[2]
README = (ROOT / "metal" / "README.md").read_text(encoding="utf-8")


def test_every_kernel_has_a_row() -> None:
    named = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| [^|]+ \|$", README, re.M)
    assert set(named) >= set(KERNELS)
    assert {path.stem for path in (ROOT / "metal").glob("*.metal")} == set(KERNELS)


def test_the_floors_are_those_of_the_script() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kernel_floors.py"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() in README


def test_the_table_of_the_h200_is_that_of_its_raw_figures() -> None:
    script = ROOT / "benchmarks" / "gpu" / "summary.py"
    raw = ROOT / "benchmarks" / "results" / "h200_f246934.jsonl"
    done = subprocess.run(
        [sys.executable, script, raw], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in README
