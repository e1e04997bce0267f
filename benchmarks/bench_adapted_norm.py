"""adapted_norm: the kernel (if there is one), and the compiled and plain reference.

    python benchmarks/bench_adapted_norm.py [--dtype bfloat16] [--rank 8] [--smoke]

The weight is dense, and packed in 4 and 8 bits (``--bits 3`` for another width). The
reference gets ‖W0‖², which training computes once, so every contender reads the weight
once.
"""

import _harness as bench
import _ops
import click

from mlx_dora.doctor.jobs import adapted_norm_job


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--dtype", type=click.Choice(list(_ops.DTYPES)), default="float32")
@click.option("--rank", "ranks", type=int, multiple=True, default=(8, 64))
@click.option("--bits", "widths", type=int, multiple=True, default=(4, 8))
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), default="32")
def main(
    settings: bench.Settings,
    dtype: str,
    ranks: tuple[int, ...],
    widths: tuple[int, ...],
    group_size: str,
) -> None:
    shapes = _ops.SMOKE_SHAPES if settings.smoke else _ops.SHAPES
    for name, shape in shapes.items():
        for rank in ranks:
            for bits in (None, *widths):
                job = adapted_norm_job(
                    shape, rank, _ops.DTYPES[dtype], bits, int(group_size)
                )
                facts = {"out": shape[0], "width": shape[1], "rank": rank}
                if bits is not None:
                    facts |= {"bits": bits, "group_size": int(group_size)}
                _ops.report(name, job, settings, **facts)


if __name__ == "__main__":
    main()
