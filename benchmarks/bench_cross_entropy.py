"""Cross-entropy over a whole vocabulary on the CPU: MLX's op, and ours in blocks.

    python benchmarks/bench_cross_entropy.py

Both are compared with float64 NumPy: the loss, its gradient with respect to the logits,
and the sum of each row of that gradient, which is 0. The time is CPU time of the loss
and its gradient, the median of rounds that alternate. One JSON line.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import mlx.core as mx
import numpy as np
from _machine import describe_machine

from mlx_dora.evaluate.token_loss import token_cross_entropy

Op = Callable[[mx.array, mx.array], mx.array]
OPS: dict[str, Op] = {"mlx": mx.fast.cross_entropy, "ours": token_cross_entropy}
BOUND = 5e-6  # of our loss


def material(rows: int, columns: int) -> tuple[mx.array, mx.array]:
    """Logits whose tail has little mass, and targets that are likely."""
    chance = np.random.default_rng(0)
    logits = (chance.normal(size=(rows, columns)) * 3 - 5).astype(np.float32)
    targets = chance.integers(0, columns, rows)
    logits[np.arange(rows), targets] = 6
    return mx.array(logits), mx.array(targets.astype(np.int32))


def errors(op: Op, logits: mx.array, targets: mx.array) -> dict[str, float]:
    """Differences from float64."""
    z, at = np.array(logits, np.float64), (np.arange(len(targets)), np.array(targets))
    shares = np.exp(z - z.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    losses, slopes = -np.log(shares[at]), shares
    slopes[at] -= 1
    gradient = mx.grad(lambda z: op(z, targets).sum())(logits)
    own = np.array(gradient, np.float64)
    return {
        "loss": float(np.abs(np.array(op(logits, targets)) - losses).max()),
        "gradient": float(np.linalg.norm(own - slopes) / np.linalg.norm(slopes)),
        "row_sum": float(np.abs(own.sum(axis=1)).max()),
    }


@click.command()
@click.option("--rows", default=128)
@click.option("--columns", default=49_152)
@click.option("--runs", default=9)
@click.option("--smoke", is_flag=True, help="Few rows, two rounds.")
def main(rows: int, columns: int, runs: int, smoke: bool) -> None:
    """Compare, time, print."""
    mx.set_default_device(mx.cpu)
    rows, runs = (8, 2) if smoke else (rows, runs)
    logits, targets = material(rows, columns)
    found: dict[str, Any] = {name: errors(op, logits, targets)
                             for name, op in OPS.items()}  # fmt: skip
    assert found["ours"]["loss"] < BOUND, "ours is off float64; nothing was timed"
    seconds: dict[str, list[float]] = {name: [] for name in OPS}
    for _ in range(runs + 1):
        for name, op in OPS.items():
            both = mx.value_and_grad(lambda z, op=op: op(z, targets).sum())
            start = time.process_time()
            mx.eval(both(logits))
            seconds[name].append(time.process_time() - start)
    for name, times in seconds.items():
        found[name]["cpu_ms"] = round(1e3 * statistics.median(times[1:]), 1)
    line = {"bench": "cross_entropy", **describe_machine(), "blas": str(bench.BLAS)}
    click.echo(json.dumps({**line, "rows": rows, "columns": columns, "ops": found}))


if __name__ == "__main__":
    main()
