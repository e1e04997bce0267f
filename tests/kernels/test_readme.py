"""Checks metal/README.md against the code it describes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_dora.kernels.dispatch import KERNELS
from tests.kernels.code_table import rows
from tests.kernels.cuda_compilers import COMPILERS

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
    tables = done.stdout.strip().split("\n\n")
    assert len(tables) == 2
    assert [table for table in tables if table not in README] == []


@pytest.mark.skipif(
    not COMPILERS, reason="no CUDA compiler: pip install -e '.[cuda-check]'"
)
def test_the_table_of_machine_code_is_that_of_the_compiler() -> None:
    """All but the registers, which change with the compiler's version."""

    def without_registers(row: str) -> str:
        return re.sub(r"^(\| [^|]+ \|) \d+ ", r"\1", row)

    given = {without_registers(row) for row in README.splitlines()}
    assert [row for row in rows() if without_registers(row) not in given] == []


def test_the_table_of_the_h200_is_that_of_its_raw_figures() -> None:
    script = ROOT / "benchmarks" / "gpu" / "summary.py"
    raw = ROOT / "benchmarks" / "results" / "h200_f246934.jsonl"
    done = subprocess.run(
        [sys.executable, script, raw], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in README
