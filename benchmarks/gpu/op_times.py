"""Kernel and plain MLX at the shapes of models: wall time, GPU time, and a copy's.

    python benchmarks/gpu/op_times.py --group scale --output results.jsonl

Wall times are those that the measured choice takes (`mlx_dora.kernels.trial`): fresh
inputs beyond the caches, both sides in turn. GPU times need torch with CUDA. A result
that is wrong is written with its error, and not timed. `--tiny` runs anywhere, on small
shapes with plain MLX in the kernel's place, to prove the script.
"""

import mlx_dora  # isort: skip - loads OpenBLAS, so before mlx

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _profile
import _turns
import mlx.core as mx

from mlx_dora.doctor import jobs
from mlx_dora.kernels import trial
from mlx_dora.kernels.choice import device_facts
from mlx_dora.kernels.measure import job_of

BF16 = mx.bfloat16
SQUARE, SMALL, LARGE, WIDE = (4096, 4096), (2048, 2048), (8192, 8192), (4096, 14336)
TOKENS = (1, 16, 64, 128, 512, 2048, 16384)
RANKS = (8, 16, 32, 64, 128, 384)
GROUPS = ("rows", "norm", "packed", "fused", "scale", "back", "half")
TINY = 32
"""Divisor of the sizes under ``--tiny``."""


def cases(group: str, shrink: int) -> Iterator[jobs.Job]:
    """Yield the jobs of a group, with sizes divided by `shrink`."""

    def small(shape: tuple[int, int]) -> tuple[int, int]:
        height, width = shape
        return max(height // shrink, 1), max(width // shrink, 64)

    if group == "rows":
        for shape in (SQUARE, SMALL, LARGE, WIDE):
            yield jobs.normalize_rows_job(small(shape), BF16)
    if group in ("norm", "packed"):
        bits = None if group == "norm" else 4
        for r in RANKS:
            yield jobs.adapted_norm_job(small(SQUARE), r, BF16, bits)
        for shape in (SMALL, LARGE, WIDE, (512, 2048), (8192, 2048), (2048, 8192)):
            yield jobs.adapted_norm_job(small(shape), 8, BF16, bits)
    if group == "fused":
        for r in (8, 64, 384):
            yield jobs.fused_weight_job(small(SQUARE), r, BF16)
        for shape in (LARGE, WIDE):
            yield jobs.fused_weight_job(small(shape), 8, BF16)
    if group in ("scale", "back"):
        is_back = group == "back"
        for r in RANKS:
            yield jobs.dora_scale_job(small((2048, 4096)), r, BF16, is_back)
        for tokens in TOKENS:
            yield jobs.dora_scale_job(small((tokens, 2048)), 8, BF16, is_back)
    if group == "half":
        for dtype in (mx.float16, mx.float32):
            yield jobs.normalize_rows_job(small(SQUARE), dtype)
            yield jobs.adapted_norm_job(small(SQUARE), 8, dtype)
            yield jobs.adapted_norm_job(small(SQUARE), 8, dtype, 4)
            yield jobs.fused_weight_job(small(SQUARE), 8, dtype)
            yield jobs.dora_scale_job(small((2048, 4096)), 8, dtype, True)


def gpu_times(job: trial.Job) -> dict[str, float | None]:
    """Return the GPU's microseconds of a call by each side."""
    count = max(2, -(-(128 << 20) // sum(a.nbytes for a in job.inputs(0))))
    sets = [job.inputs(seed) for seed in range(min(count, 16))]
    mx.eval(sets)
    sides = {"kernel_gpu_us": job.kernel, "plain_gpu_us": job.plain}
    return {
        name: _profile.microseconds(
            lambda n, side=side: mx.eval(side(*sets[n % len(sets)])), 12
        )
        for name, side in sides.items()
    }


def copy_gbps(nbytes: int) -> float:
    """Return the bandwidth of a copy of as many bytes, on fresh arrays."""
    elements = max(nbytes // 4, 1)

    def inputs(seed: int) -> tuple[mx.array, ...]:
        return (mx.full((elements,), seed, dtype=BF16),)

    job = trial.Job(inputs=inputs, kernel=mx.negative, plain=mx.negative)
    return 4 * elements / statistics.median(trial.rounds(job)[0]) / 1e9


def main() -> None:
    """Check all cases, wait for the turn, time them."""
    parser = argparse.ArgumentParser(description="Kernels against plain MLX")
    parser.add_argument("--group", choices=GROUPS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    compiled = []
    for job in cases(options.group, TINY if options.tiny else 1):
        both = job_of(job.case)
        if options.tiny:
            both = dataclasses.replace(both, kernel=both.plain)
        found = trial.check(job.case, both)
        moved = job.traffic
        lines.append(
            {
                "op": job.name,
                "dtype": job.case.dtype_name,
                "shape": [job.case.rows, job.case.columns],
                "r": job.case.rank,
                "bytes_moved": moved.large,
                "bytes_reread": moved.rereads,
                "first_seconds": found.first_seconds,
                "error": found.error,
                "problem": found.problem,
            }
        )
        compiled.append(both)
        mx.clear_cache()
    _turns.ready()
    with options.output.open("a") as file:
        for line, both in zip(lines, compiled, strict=True):
            if line["problem"] is None:
                kernel, plain = map(statistics.median, trial.rounds(both))
                line |= {"kernel_us": 1e6 * kernel, "plain_us": 1e6 * plain}
                line |= gpu_times(both)
                line["copy_gbps"] = copy_gbps(line["bytes_moved"])
            facts = {"mlx_dora": mlx_dora.__version__, "device": device_facts()}
            line |= {"group": options.group, **facts}
            file.write(json.dumps(line) + "\n")
            file.flush()
            mx.clear_cache()
            print(summary(line), flush=True)
    _turns.done()


def summary(line: dict[str, Any]) -> str:
    """Return a result as a line to read."""
    name = f"{line['op']:24} {line['dtype']:8} {line['shape']} r {line['r']}"
    if line["problem"] is not None:
        return f"{name}: {line['problem']}"
    kernel, plain = line["kernel_us"], line["plain_us"]
    gbps = line["bytes_moved"] / kernel / 1e3
    return (
        f"{name}: kernel {kernel:.1f} us ({gbps:.0f} GB/s, "
        f"{gbps / line['copy_gbps']:.0%} of a copy), plain {plain:.1f} us, "
        f"ratio {kernel / plain:.2f}, error {line['error']:.0e}, "
        f"first call {line['first_seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
