"""Time merges of adapters in core space against dense matrices and an SVD.

    python benchmarks/bench_merge_core.py [--rank 16] [--adapters 2] [--method ties]

N DoRA adapters of rank r on one matrix are merged by a method in core space
(arXiv:2509.17786), magnitudes on their own. ``core space`` is `merge_in_space`, whose
result has rank N·r or less. ``dense + SVD`` builds the N updates in NumPy float32,
merges their entries (ties) or singular values (iso), and returns to rank N·r with
NumPy's SVD. For iso both give the same matrix; for ties the cores are merged in place
of the entries. The script first compares the merge in core space with a dense float64
computation, which must agree to 1e-5.
"""

import _harness as bench
import click
import mlx.core as mx
import numpy as np
from bench_merge import SMOKE, adapted, make_inputs

from mlx_dora.matrix import Adapted, LowRank
from mlx_dora.merge.adapters.dense import Options
from mlx_dora.merge.adapters.factored import MergedMatrix
from mlx_dora.merge.adapters.in_space import merge_in_space
from mlx_dora.merge.methods.spaces import SPACES

SHAPES = {"q_proj": (2048, 2048)}
METHODS = ("ties", "iso")
DENSITY = 0.2


def core_merge(weight: mx.array, inputs: list[Adapted], method: str) -> MergedMatrix:
    return merge_in_space(
        weight,
        inputs,
        np.ones((weight.shape[0], len(inputs))),
        method=method,
        space=SPACES["core"],
        scale=2.0,
        options=Options(density=DENSITY if method == "ties" else None),
    )


def update_of(one: Adapted, dtype: type) -> np.ndarray:
    a, b = (np.array(x, dtype) for x in (one.update.lora_a, one.update.lora_b))
    return one.update.scale * (a @ b).T


def ties(changes: list[np.ndarray]) -> np.ndarray:
    """TIES with weights 1."""
    kept = []
    for change in changes:
        size = np.abs(change)
        place = size.size - max(1, int(DENSITY * size.size))
        least = np.partition(size.ravel(), place)[place]
        kept.append(np.where(size >= least, change, 0))
    sign = np.where(np.sum(kept, axis=0) >= 0, 1, -1)
    agrees = [np.sign(change) == sign for change in kept]
    moved = sum(np.where(a, change, 0) for a, change in zip(agrees, kept, strict=True))
    return moved / np.maximum(np.sum(agrees, axis=0), 1)


def iso(changes: list[np.ndarray], rank: int) -> np.ndarray:
    """Iso-C over the first `rank` singular values; of vectors, the mean."""
    total = np.sum(changes, axis=0)
    if total.ndim < 2:
        return total / len(changes)
    u, sizes, v = np.linalg.svd(total, full_matrices=False)
    return sizes[:rank].mean() * (u[:, :rank] @ v[:rank])


def dense_merge(
    weight: np.ndarray, inputs: list[Adapted], method: str
) -> tuple[np.ndarray, ...]:
    """Factors and magnitudes of a merge of dense updates, float32."""
    updates = [update_of(one, np.float32) for one in inputs]
    norm = np.linalg.norm(weight, axis=1)
    moved = [np.array(one.m) - norm for one in inputs]
    rank = sum(one.update.rank for one in inputs)
    if method == "iso":
        total = np.sum(updates, axis=0)
        u, sizes, v = np.linalg.svd(total, full_matrices=False)
        sizes = np.full_like(sizes, sizes[:rank].mean())
        m = norm + iso(moved, rank)
    else:
        u, sizes, v = np.linalg.svd(ties(updates), full_matrices=False)
        m = norm + ties(moved)
    return sizes[:rank, None] * v[:rank], u[:, :rank], m


def check(weight: mx.array, inputs: list[Adapted], method: str) -> float:
    """Compare with a dense float64 computation of the cores; returns the error."""
    base = np.array(weight, np.float64)
    updates = [update_of(one, np.float64) for one in inputs]
    bases = [
        np.linalg.svd(np.hstack(columns), full_matrices=False)[0]
        for columns in (
            [one.update.scale * np.array(one.update.lora_b, np.float64).T
             for one in inputs],
            [np.array(one.update.lora_a, np.float64) for one in inputs],
        )
    ]  # fmt: skip
    left, right = bases
    cores = [left.T @ update @ right for update in updates]
    norm = np.linalg.norm(base, axis=1)
    moved = [np.array(one.m, np.float64) - norm for one in inputs]
    if method == "iso":
        core, length = iso(cores, len(cores[0])), iso(moved, 0)
    else:
        core, length = ties(cores), ties(moved)
    rows = base + left @ core @ right.T
    rows *= ((norm + length) / np.linalg.norm(rows, axis=1))[:, None]
    merged = core_merge(weight, inputs, method)
    update = LowRank(lora_a=merged.lora_a, lora_b=merged.lora_b, scale=2.0)
    found = adapted(weight, Adapted(update=update, m=merged.m)) - base
    error = bench.relative_rms(mx.array(found), mx.array(rows - base))
    if not error < 1e-5:
        raise click.ClickException(f"{method}: off by {error:.1e}; nothing timed.")
    return error


def case(
    name: str, shape: tuple[int, int], rank: int, count: int, method: str
) -> bench.Case:
    mx.random.seed(0)
    weight = mx.random.normal(shape) / shape[1] ** 0.5
    mx.eval(weight)
    inputs = make_inputs(shape, rank, count)
    values = np.array(weight)
    error = check(weight, inputs, method)

    def ours() -> mx.array:
        merged = core_merge(weight, inputs, method)
        return mx.concatenate([merged.lora_b.reshape(-1), merged.m])

    def through_svd() -> mx.array:
        down, up, m = dense_merge(values, inputs, method)
        return mx.concatenate([mx.array(x.ravel()) for x in (down, up, m)])

    return bench.Case(
        name=f"{method} {name}",
        dtype="float32",
        contenders=[
            bench.Contender(name="core space", run=ours),
            bench.Contender(name="dense + SVD", run=through_svd),
        ],
        baseline="core space",
        facts={
            "shape": f"{shape[0]}x{shape[1]}",
            "rank": rank,
            "adapters": count,
            "error": float(f"{error:.1e}"),
        },
    )


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--rank", default=16, show_default=True)
@click.option("--adapters", default=2, show_default=True)
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=METHODS,
    type=click.Choice(METHODS),
    help="Repeatable.",
)
def main(
    settings: bench.Settings, rank: int, adapters: int, methods: tuple[str, ...]
) -> None:
    for name, shape in (SMOKE if settings.smoke else SHAPES).items():
        for method in methods:
            made = case(name, shape, rank, adapters, method)
            bench.report(bench.measure(made, settings))


if __name__ == "__main__":
    main()
