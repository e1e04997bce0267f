"""The text that MLX's CUDA build makes of a kernel, and its machine code for sm_90a.

MLX writes that text only where it has CUDA, so `cuda_text` writes it here as
`mlx/backend/cuda/custom_kernel.cpp` does, with stand-ins for MLX's own headers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx

from mlx_dora.kernels import dispatch, plans
from tests.kernels.cuda_compilers import COMPILERS
from tests.kernels.machine_code import MachineCode, read_cubin

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
#include <cuda/std/cstdint>
using cuda::std::int32_t;
using cuda::std::uint32_t;
using cuda::std::uint64_t;
using Shape = cuda::std::array<int32_t, 8>;
"""


@dataclass(frozen=True)
class Use:
    """One launch of a kernel, with the dtypes of its inputs."""

    kernel: str
    dtypes: tuple[mx.Dtype, ...]
    launch: plans.Launch

    @property
    def threadgroups(self) -> int:
        """Threadgroups of the launch."""
        total = 1
        for grid, threads in zip(
            self.launch.grid, self.launch.threadgroup, strict=True
        ):
            total *= grid // threads
        return total


def sources() -> dict[str, dict[str, Any]]:
    """Return the arguments that the library passes to `mx.fast.cuda_kernel`."""
    made: dict[str, dict[str, Any]] = {}

    def keep(**arguments: Any) -> None:
        made[arguments["name"].removeprefix("mlx_dora_")] = arguments

    with mock.patch.object(mx.fast, "cuda_kernel", keep):
        dispatch.build.cache_clear()
        for name in dispatch.KERNELS:
            dispatch.build(name, "cuda")
        dispatch.build.cache_clear()
    return made


def cuda_text(number: int, made: dict[str, Any], use: Use) -> str:
    """Return the text of one kernel, named by a number."""
    source = made["source"]
    lines = []
    for name, dtype in zip(made["input_names"], use.dtypes, strict=True):
        lines.append(f"const {TYPES[dtype]}* {name}")
        if f"{name}_shape" in source:
            lines.append(f"const __grid_constant__ Shape {name}_shape")
    outputs = zip(made["output_names"], use.launch.output_dtypes, strict=True)
    lines += [f"{TYPES[dtype]}* {name}" for name, dtype in outputs]
    constants = []
    for name, value in use.launch.template:
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


def machine_code(uses: Sequence[Use], folder: Path) -> list[MachineCode]:
    """Compile every use and read the result; with NVRTC, as MLX does, if it is here."""
    made = sources()
    kernels = [cuda_text(i, made[use.kernel], use) for i, use in enumerate(uses)]
    header = made["dora_scale"]["header"]
    text = "\n".join([HEADERS, header, "namespace mlx::core::cu {", *kernels, "}"])
    compile_to_cubin = next(iter(COMPILERS.values()))
    read = read_cubin(compile_to_cubin(text, folder))
    return [read[f"kernel_{i}"] for i in range(len(uses))]
