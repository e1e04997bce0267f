"""Shared code of the four bench_<op>.py: run a job of the package in the harness."""

import _harness as bench
import mlx.core as mx

from mlx_dora.doctor.jobs import Job
from mlx_dora.kernels.dispatch import device_backend

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# W0 as (out, in), from the configs of widely used models.
SHAPES = {
    "SmolLM2-135M q_proj": (576, 576),
    "Llama-3.2-1B q_proj": (2048, 2048),
    "Llama-3.1-8B q_proj": (4096, 4096),
    "Llama-3.1-8B down_proj": (4096, 14336),
}
SMOKE_SHAPES = {"tiny": (65, 96)}
BOUNDS = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}


def report(name: str, job: Job, settings: bench.Settings, **facts: int) -> None:
    """Time the plain and the compiled reference, and the kernel if there is one."""
    dtype = str(job.dtype).removeprefix("mlx.core.")
    compiled = mx.compile(job.reference)
    mx.eval(job.arrays)

    def plain() -> bench.Arrays:
        return job.reference(*job.arrays)

    contenders = [
        bench.Contender(name="plain reference", run=plain),
        bench.Contender(
            name="compiled reference",
            run=lambda: compiled(*job.arrays),
            expected=plain,
            bound=BOUNDS[dtype],
        ),
    ]
    if device_backend() != "reference":
        contenders.append(
            bench.Contender(
                name="kernel",
                run=lambda: job.kernel(*job.arrays),
                expected=plain,
                bound=BOUNDS[dtype],
            )
        )
    case = bench.Case(
        name=f"{job.name}, {name}",
        dtype=dtype,
        contenders=contenders,
        baseline="compiled reference",
        facts={
            **facts,
            "backend": device_backend(),
            "kernel_bytes": job.traffic.large,
            "kernel_reread_bytes": job.traffic.rereads,
        },
    )
    bench.report(bench.measure(case, settings))
