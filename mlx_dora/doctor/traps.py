"""Lists known problems of machines like this one, with remedies."""

from collections.abc import Sequence

from mlx_dora.doctor.checks import SLOW_GFLOPS, LayerCheck
from mlx_dora.doctor.examine import KernelCheck
from mlx_dora.doctor.machine import Machine, Memory
from mlx_dora.openblas import LIBRARY, OpenBLASStatus


def find_traps(
    machine: Machine,
    memory: Memory,
    blas: OpenBLASStatus,
    gflops: float,
    layers: list[LayerCheck],
    kernels: Sequence[KernelCheck] = (),
) -> list[str]:
    """Return the warnings that apply to this machine, worst first."""
    traps = [
        f"WRONG RESULTS: the layer on a {check.name} base is off by {check.error:.1e} "
        f"(allowed: {check.bound:.0e}). Please report this table."
        for check in layers
        if not check.is_right
    ]
    traps += [
        f"The {check.name} kernel in {check.dtype} "
        + (f"{check.problem} here" if check.problem else "is WRONG here")
        + ". Plain MLX is used instead. Please report this table."
        for check in kernels
        if not check.is_right
    ]
    if not machine.is_gpu and gflops < SLOW_GFLOPS:
        traps.append(
            f"float32 products are slow ({gflops:.0f} GFLOP/s); OpenBLAS reaches a "
            f"hundred times the reference BLAS. {blas.message} Or start Python with "
            f"LD_PRELOAD={LIBRARY}."
        )
    if not machine.is_gpu:
        traps.append(
            "On a CPU, run models in float32: half precision does not benefit from "
            "OpenBLAS, and MLX's quantized product sums in it (measured error on a "
            "4-bit layer: 0.4 % in float16, 3.6 % in bfloat16)."
        )
    if machine.is_mac:
        traps += [
            "macOS stops long GPU commands while the display is on; "
            "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 is reported to help.",
            "Running out of Metal memory aborts the whole process without a Python "
            "error: lower --batch-size or --max-seq-length, or use --grad-checkpoint.",
        ]
        if memory.wired_limit_mb == 0:
            traps.append(
                "Models near the recommended working set run slowly unless the wired "
                "limit is raised: sudo sysctl iogpu.wired_limit_mb=N (N in MB)."
            )
        if memory.sleep_minutes != 0:
            after = f" after {memory.sleep_minutes} idle minutes"
            traps.append(
                f"This Mac sleeps{after if memory.sleep_minutes else ' when idle'}, "
                "which pauses training: start it with caffeinate -i mlx_dora.train ... "
                "(with the lid closed and no display, the Mac still sleeps)."
            )
    if machine.is_gpu:
        traps.append(
            "MLX keeps freed buffers for reuse, up to its memory limit, so other "
            "programs cannot use this memory. Training releases it after every step "
            "(--clear-cache-threshold 2GB keeps that much, for speed); elsewhere, "
            "mx.set_cache_limit limits it."
        )
    traps.append(
        "Stock mlx-lm cannot load DoRA on 3-, 5- and 6-bit bases or on quantized "
        "embeddings, and its fusing into 4 bits loses most of the update; "
        "mlx_dora.generate, chat, server and fuse handle them."
    )
    return traps
