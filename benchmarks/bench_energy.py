"""Processor time and memory of extracting one matrix by a share of its energy.

    OPENBLAS_NUM_THREADS=1 python benchmarks/bench_energy.py [--size 2048] [--smoke]

The fine-tuned matrix differs from its base by singular values 1, d, d², ..., so that a
share of .9 takes more directions the slower they decay. Up to an eighth of all
directions the update comes from randomized subspace iteration, beyond from a dense
decomposition. Memory is the peak of the process (Linux only), less what it had before.
The script stops if an update lacks energy.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import re
import time
from pathlib import Path

import click
import mlx.core as mx
import numpy as np

from mlx_dora.merge.adapters.factor import factor, row_norm
from mlx_dora.merge.adapters.nearest import nearest

ENERGY = 0.9
SHARES = (1 / 64, 1 / 12, 1 / 4)
"""Directions that hold the energy, as a share of all."""


def pair(size: int, share: float) -> tuple[mx.array, mx.array]:
    """A base, and a matrix whose change has its energy in a share of the directions."""
    draw = np.random.default_rng(0)
    left, right = (np.linalg.qr(draw.standard_normal((size, size)))[0] for _ in "uv")
    values = (1 - ENERGY) ** (np.arange(size) / (2 * share * size))
    base = draw.standard_normal((size, size)) / size**0.5
    tuned = base + 0.01 * (left * values) @ right.T
    return mx.array(base.astype("f4")), mx.array(tuned.astype("f4"))


def resident(field: str) -> int:
    """Resident memory in bytes: now (``VmRSS``), or the peak (``VmHWM``)."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def extract(size: int, share: float) -> None:
    """Extract one matrix, and print time and memory."""
    base, tuned = pair(size, share)
    mx.eval(base, tuned)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = resident("VmRSS"), time.process_time()
    near = nearest(base, tuned, rank=None, energy=ENERGY)
    if near is None:
        made = factor(base, tuned, row_norm(tuned), scale=1.0, energy=ENERGY)
    else:
        made, _ = near
    used = time.process_time() - started
    if made.discarded > 1 - ENERGY + 1e-6:
        raise click.ClickException(f"lost {made.discarded:.3f} of the energy.")
    facts = {
        "size": size,
        "rank": made.rank,
        "way": "dense" if near is None else "randomized",
        "cpu_seconds": round(used, 2),
        "megabytes": round((resident("VmHWM") - before) / 1e6),
    }
    click.echo(json.dumps(facts))


@click.command(help=__doc__)
@click.option("--size", default=2048, show_default=True)
@click.option("--smoke", is_flag=True, help="A small matrix.")
def main(size: int, smoke: bool) -> None:
    click.echo(f"BLAS: {bench.BLAS.state}", err=True)
    for share in SHARES:
        extract(512 if smoke else size, share)


if __name__ == "__main__":
    main()
