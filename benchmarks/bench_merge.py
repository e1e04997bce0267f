"""Time the merge of adapters in factored form against dense weights and an SVD.

    python benchmarks/bench_merge.py [--rank 16] [--adapters 2] [--smoke]

N DoRA adapters of rank r on one matrix are merged by the normalized mean of directions
(for two adapters, the midpoint of slerp). ``ours`` is `merge_matrix`, exact, with a
result of rank N·r. ``dense + SVD`` builds each adapted weight, merges the lengths and
directions of its rows in NumPy float32, and returns to rank N·r with NumPy's SVD. The
script compares the two merges first. Neither memory figure includes NumPy's arrays.
"""

import _harness as bench
import click
import mlx.core as mx
import numpy as np

from mlx_dora.kernels import fused_weight
from mlx_dora.matrix import Adapted, LowRank
from mlx_dora.merge.adapters.factored import merge_matrix

SHAPES = {"q_proj": (2048, 2048), "down_proj": (2048, 8192)}
SMOKE = {"tiny": (64, 96)}


def make_inputs(shape: tuple[int, int], rank: int, count: int) -> list[Adapted]:
    rows, width = shape
    made = []
    for seed in range(count):
        mx.random.seed(seed + 1)
        lora_a = mx.random.normal((width, rank)) / width**0.5
        lora_b = 0.3 * mx.random.normal((rank, rows)) / rank**0.5
        m = 1 + 0.01 * mx.random.normal((rows,))
        mx.eval(lora_a, lora_b, m)
        update = LowRank(lora_a=lora_a, lora_b=lora_b, scale=2.0)
        made.append(Adapted(update=update, m=m))
    return made


def adapted(weight: mx.array, one: Adapted) -> np.ndarray:
    update = one.update
    assert one.m is not None
    return np.array(
        fused_weight(weight, update.lora_a, update.lora_b, update.scale, one.m)
    )


def dense_merge(weight: mx.array, inputs: list[Adapted]) -> np.ndarray:
    parts = [adapted(weight, one) for one in inputs]
    norms = [np.linalg.norm(one, axis=1, keepdims=True) for one in parts]
    units = [one / norm for one, norm in zip(parts, norms, strict=True)]
    mean = np.sum(units, axis=0)  # slerp's midpoint has the direction of the mean
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    return np.mean(norms, axis=0) * mean


def case(name: str, shape: tuple[int, int], rank: int, count: int) -> bench.Case:
    mx.random.seed(0)
    weight = mx.random.normal(shape) / shape[1] ** 0.5
    mx.eval(weight)
    inputs = make_inputs(shape, rank, count)
    shares = np.full((shape[0], count), 1 / count)

    def ours() -> mx.array:
        merged = merge_matrix(weight, inputs, shares, method="nmean", scale=2.0)
        return mx.concatenate([merged.lora_a.reshape(-1), merged.m])

    def through_svd() -> mx.array:
        merged = dense_merge(weight, inputs)
        start = np.array(weight)
        length = np.linalg.norm(start, axis=1) / np.linalg.norm(merged, axis=1)
        change = length[:, None] * merged - start
        u, s, v = np.linalg.svd(change, full_matrices=False)
        kept = count * rank
        m = np.linalg.norm(merged, axis=1)
        return mx.concatenate(
            [mx.array((s[:kept, None] * v[:kept]).ravel()), mx.array(m), mx.array(u[0])]
        )

    check(weight, inputs, shares)
    return bench.Case(
        name=f"merge {name}",
        dtype="float32",
        contenders=[
            bench.Contender(name="ours", run=ours),
            bench.Contender(name="dense + SVD", run=through_svd),
        ],
        baseline="ours",
        facts={"shape": f"{shape[0]}x{shape[1]}", "rank": rank, "adapters": count},
    )


def check(weight: mx.array, inputs: list[Adapted], shares: np.ndarray) -> None:
    merged = merge_matrix(weight, inputs, shares, method="nmean", scale=2.0)
    update = LowRank(lora_a=merged.lora_a, lora_b=merged.lora_b, scale=2.0)
    found = adapted(weight, Adapted(update=update, m=merged.m))
    error = bench.relative_rms(mx.array(found), mx.array(dense_merge(weight, inputs)))
    if not error < 1e-5:
        raise click.ClickException(f"the merges differ by {error:.1e}; nothing timed.")


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--rank", default=16, show_default=True)
@click.option("--adapters", default=2, show_default=True)
def main(settings: bench.Settings, rank: int, adapters: int) -> None:
    for name, shape in (SMOKE if settings.smoke else SHAPES).items():
        bench.report(bench.measure(case(name, shape, rank, adapters), settings))


if __name__ == "__main__":
    main()
