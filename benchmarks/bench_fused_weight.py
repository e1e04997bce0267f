"""fused_weight: the kernel (if there is one), and the compiled and plain reference.

python benchmarks/bench_fused_weight.py [--dtype bfloat16] [--rank 8] [--smoke]

The shapes are those of q_proj and down_proj in four models.
"""

import _harness as bench
import _ops
import click

from mlx_dora.doctor.jobs import fused_weight_job


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--dtype", type=click.Choice(list(_ops.DTYPES)), default="float32")
@click.option("--rank", "ranks", type=int, multiple=True, default=(8, 64))
def main(settings: bench.Settings, dtype: str, ranks: tuple[int, ...]) -> None:
    shapes = _ops.SMOKE_SHAPES if settings.smoke else _ops.SHAPES
    for name, shape in shapes.items():
        for rank in ranks:
            job = fused_weight_job(shape, rank, _ops.DTYPES[dtype])
            facts = {"out": shape[0], "width": shape[1], "rank": rank}
            _ops.report(name, job, settings, **facts)


if __name__ == "__main__":
    main()
