"""``python -m tests.kernels.code_table`` prints the README's table of machine code."""

import tempfile
from pathlib import Path

import mlx.core as mx

from mlx_dora.kernels import plans
from tests.kernels.cuda_text import Use, machine_code
from tests.kernels.machine_code import resident_threadgroups

CORES = 132  # of an H100 and an H200
SIZES = (2048, 4096)
_HALF, _FLOAT = mx.bfloat16, mx.float32


def uses(n: int) -> dict[str, Use]:
    """The kernels in bfloat16 for n x n weights, or 2048 tokens of n outputs."""
    shape, tokens = (n, n), (2048, n)
    found = {
        "normalize_rows": Use(
            "normalize_rows", (_HALF, _FLOAT), plans.plan_normalize_rows(shape, _HALF)
        )
    }
    for r in (8, 64):
        dense = plans.plan_adapted_norm(shape, r, _HALF, cores=CORES)
        found[f"adapted_norm, r {r}"] = Use(
            "adapted_norm", (_HALF, _FLOAT, _FLOAT), dense
        )
        packed = plans.plan_adapted_norm_packed(shape, r, 4, 64, cores=CORES)
        dtypes = (mx.uint32, _HALF, _HALF, _FLOAT, _FLOAT)
        found[f"adapted_norm 4-bit, r {r}"] = Use("adapted_norm_packed", dtypes, packed)
        fused = plans.plan_fused_weight(shape, r, _HALF, cores=CORES)
        dtypes = (_HALF, _FLOAT, _FLOAT, _FLOAT)
        found[f"fused_weight, r {r}"] = Use("fused_weight", dtypes, fused)
        scale = plans.plan_dora_scale(tokens, r, _HALF, False, cores=CORES)
        dtypes = (_HALF, _HALF, _FLOAT, _FLOAT, _FLOAT)
        found[f"dora_scale, r {r}"] = Use("dora_scale", dtypes, scale)
    back = plans.plan_dora_scale_backward(tokens, _HALF, False, cores=CORES)
    dtypes = (_HALF, _HALF, _FLOAT, _FLOAT)
    found["dora_scale backward"] = Use("dora_scale_backward", dtypes, back)
    return found


def rows() -> list[str]:
    """The table, a line a row."""
    lines = [
        "| kernel | registers | spills | loads, stores | barriers "
        "| threadgroups, 2048 and 4096 | simdgroups resident |",
        "| --- | ---: | ---: | --- | ---: | --- | ---: |",
    ]
    by_size = [uses(n) for n in SIZES]
    with tempfile.TemporaryDirectory() as folder:
        code = machine_code(list(by_size[-1].values()), Path(folder))
    for (name, use), kernel in zip(by_size[-1].items(), code, strict=True):
        threads = use.launch.threadgroup[0]
        resident = resident_threadgroups(kernel, threads)
        groups = ", ".join(str(each[name].threadgroups) for each in by_size)
        widths = f"{kernel.widest('LDG')}, {kernel.widest('STG')} bytes"
        lines.append(
            f"| {name} | {kernel.registers} | {kernel.spills} | {widths} "
            f"| {kernel.counts['BAR']} | {groups} | {resident * threads // 32} of 64 |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))  # noqa: T201 - a table
