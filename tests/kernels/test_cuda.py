"""The kernels as CUDA: the text that MLX's CUDA build makes, compiled for sm_90.

MLX writes that text only where it has CUDA, so `cuda_text` writes it here as
`mlx/backend/cuda/custom_kernel.cpp` does, with stand-ins for MLX's own headers.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora.kernels import _source, dispatch, plans

NVCC = shutil.which("nvcc")
TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.uint32: "uint32_t",
}
HEADERS = """
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cstdint>
using Shape = cuda::std::array<int32_t, 8>;
"""
FLOAT = mx.float32


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """Arguments that the library passes to `mx.fast.cuda_kernel`, by kernel."""
    made: dict[str, dict[str, Any]] = {}

    def keep(**arguments: Any) -> None:
        made[arguments["name"].removeprefix("mlx_dora_")] = arguments

    monkeypatch.setattr(mx.fast, "cuda_kernel", keep)
    dispatch.build.cache_clear()
    for name in dispatch.KERNELS:
        dispatch.build(name, "cuda")
    yield made
    dispatch.build.cache_clear()


def cuda_text(
    number: int,
    made: dict[str, Any],
    dtypes: list[mx.Dtype],
    launch: plans.Launch,
) -> str:
    source = made["source"]
    lines = []
    for name, dtype in zip(made["input_names"], dtypes, strict=True):
        lines.append(f"const {TYPES[dtype]}* {name}")
        if f"{name}_shape" in source:
            lines.append(f"const __grid_constant__ Shape {name}_shape")
    outputs = zip(made["output_names"], launch.output_dtypes, strict=True)
    lines += [f"{TYPES[dtype]}* {name}" for name, dtype in outputs]
    constants = []
    for name, value in launch.template:
        if isinstance(value, mx.Dtype):
            constants.append(f"  using {name} = {TYPES[value]};")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            constants.append(f"  constexpr {kind} {name} = {str(value).lower()};")
    return "\n".join(
        [
            f"__global__ void kernel_{number}({', '.join(lines)}) {{",
            *constants,
            source,
            "}",
        ]
    )


def calls() -> Iterator[tuple[str, list[mx.Dtype], plans.Launch]]:
    """Every kernel in every dtype and bit width; long rows; a rank past the tiles."""
    rank = [FLOAT] * 3
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        for shape, r in (((4096, 4096), 8), ((65, 8192), 129)):
            rows = plans.plan_normalize_rows(shape, dtype)
            yield "normalize_rows", [dtype, FLOAT], rows
            yield "adapted_norm", [dtype, *rank], plans.plan_adapted_norm(shape, r)
            fused = plans.plan_fused_weight(shape, r, dtype)
            yield "fused_weight", [dtype, *rank, FLOAT], fused
            scale = plans.plan_dora_scale(shape, r, dtype, r == 8)
            yield "dora_scale", [dtype, dtype, *rank], scale
            back = plans.plan_dora_scale_backward(shape, dtype, r == 8)
            yield "dora_scale_backward", [dtype, dtype, FLOAT, FLOAT], back
    for bits in (2, 3, 4, 5, 6, 8):
        plan = plans.plan_adapted_norm_packed(4096, 8, bits, 64)
        dtype = mx.float16 if bits % 2 else mx.bfloat16
        yield "adapted_norm_packed", [mx.uint32, dtype, dtype, *rank], plan
    yield "dora_scale_columns", [FLOAT] * 2, plans.plan_dora_scale_columns(2, 3, 77)


def test_no_word_of_metal_is_left(sources: dict[str, dict[str, Any]]) -> None:
    assert set(sources) == set(dispatch.KERNELS)
    for name, made in sources.items():
        text = made["header"].split("MLX_DORA_COMMON_H")[1] + made["source"]
        left = re.findall(r"\b(?:device|constant|thread|threadgroup)\b", text)
        assert left == [], name
        declared = _source.read_source(f"{name}.metal").count("threadgroup float")
        assert made["source"].count("__shared__ float") == declared


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_every_kernel_compiles_for_sm_90(
    sources: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    kernels = [
        cuda_text(number, sources[name], dtypes, launch)
        for number, (name, dtypes, launch) in enumerate(calls())
    ]
    header = sources["dora_scale"]["header"]
    source = tmp_path / "kernels.cu"
    source.write_text(
        "\n".join([HEADERS, header, "namespace mlx::core::cu {", *kernels, "}"])
    )
    command = [str(NVCC), "-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings"]
    done = subprocess.run(
        [*command, "-diag-suppress=177", "-o", tmp_path / "kernels.cubin", source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:3000]
    assert (tmp_path / "kernels.cubin").stat().st_size > 0
