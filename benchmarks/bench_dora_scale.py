"""dora_scale: the kernel (if there is one), and the compiled and plain reference.

    python benchmarks/bench_dora_scale.py [--dtype bfloat16] [--rank 8] [--smoke]

Times the forward pass, alone and with all gradients, for 1, 128 and 2048 tokens.
"""

import _harness as bench
import _ops
import click

from mlx_dora.doctor.jobs import dora_scale_job

OUTPUTS = {"SmolLM2-135M q_proj": 576, "Llama-3.1-8B q_proj": 4096}
TOKENS = (1, 128, 2048)


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--dtype", type=click.Choice(list(_ops.DTYPES)), default="float32")
@click.option("--rank", "ranks", type=int, multiple=True, default=(8, 64))
def main(settings: bench.Settings, dtype: str, ranks: tuple[int, ...]) -> None:
    outputs = {"tiny": 65} if settings.smoke else OUTPUTS
    for name, out in outputs.items():
        for tokens in (1, 7) if settings.smoke else TOKENS:
            for rank in ranks:
                for backward in (False, True):
                    shape = (tokens, out)
                    job = dora_scale_job(shape, rank, _ops.DTYPES[dtype], backward)
                    facts = {"tokens": tokens, "out": out, "rank": rank}
                    _ops.report(name, job, settings, **facts)


if __name__ == "__main__":
    main()
