"""normalize_rows: the kernel (if there is one), and the compiled and plain reference.

python benchmarks/bench_normalize_rows.py [--dtype bfloat16] [--smoke]

The shapes are those of q_proj and down_proj in four models.
"""

import _harness as bench
import _ops
import click

from mlx_dora.doctor.jobs import normalize_rows_job


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--dtype", type=click.Choice(list(_ops.DTYPES)), default="float32")
def main(settings: bench.Settings, dtype: str) -> None:
    shapes = _ops.SMOKE_SHAPES if settings.smoke else _ops.SHAPES
    for name, shape in shapes.items():
        job = normalize_rows_job(shape, _ops.DTYPES[dtype])
        _ops.report(name, job, settings, out=shape[0], width=shape[1])


if __name__ == "__main__":
    main()
