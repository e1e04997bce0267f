"""Runs all checks and returns sections of labels and values to print."""

import dataclasses

import mlx.core as mx

from mlx_dora import __version__, openblas
from mlx_dora.doctor.checks import (
    SLOW_GFLOPS,
    LayerCheck,
    check_layers,
    matmul_gflops,
)
from mlx_dora.doctor.examine import Examination, examine
from mlx_dora.doctor.kernels import choice_rows, kernel_rows, timing_rows
from mlx_dora.doctor.machine import (
    Memory,
    describe_machine,
    describe_memory,
    describe_versions,
)
from mlx_dora.doctor.of_model import measure_model, model_rows
from mlx_dora.doctor.surroundings import disk_rows, hub_row, optional_rows
from mlx_dora.doctor.traps import find_traps
from mlx_dora.kernels.dispatch import device_backend
from mlx_dora.kernels.kept import Choices

UNVERIFIED = (
    "The authors of mlx_dora have never run it on a Mac: they made all measurements on "
    "Linux. Its kernels were tested in a Linux model of the Metal language, and an "
    "earlier version of them once on an NVIDIA H200. If this machine has a GPU, this "
    "table is new information; please paste it into an issue."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was examined on this machine.

    Attributes:
        sections: Rows of label and value, by title.
        traps: The warnings that apply.
        wrong: Layers and kernels whose results are wrong.
        is_slow: Whether the CPU computes without a fast BLAS.
        choices: What was measured for each kind of call, on a GPU.
    """

    sections: dict[str, list[tuple[str, str]]]
    traps: list[str]
    wrong: tuple[str, ...]
    is_slow: bool
    choices: Choices = dataclasses.field(default_factory=dict)

    @property
    def is_healthy(self) -> bool:
        """Whether all results are right."""
        return not self.wrong

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        if self.wrong:
            return f"WRONG RESULTS on this machine: {', '.join(self.wrong)}."
        if self.is_slow:
            return "mlx_dora computes right results here, but slowly: see Known traps."
        return "mlx_dora works on this machine: all results are right."


def diagnose(model: str | None = None, rank: int = 8, tokens: int = 2048) -> Diagnosis:
    """Examine this machine; takes seconds, or minutes where kernels are compiled.

    Args:
        model: Also measure the kernels at the shapes of this model, or None.
        rank: Rank of the adapter that is measured with `model`.
        tokens: Tokens of the batch that is measured with `model`.

    Raises:
        DoRAError: If the model does not exist or cannot be adapted.
    """
    of_model = None if model is None else measure_model(model, rank, tokens)
    blas = openblas.preload()
    machine, memory = describe_machine(), describe_memory()
    gflops, half = matmul_gflops(), matmul_gflops(mx.bfloat16)
    layers = check_layers()
    kernels = examine() if device_backend() != "reference" else None
    sections = {
        "Machine": [
            ("device", machine.device),
            ("chip", f"{machine.chip}, {machine.cores} cores"),
            ("system", machine.system),
            *([] if kernels else [("kernels", "none on a CPU: plain MLX computes")]),
        ],
        "Versions": [
            ("mlx_dora", __version__),
            ("python", machine.python),
            *describe_versions().items(),
        ],
        "Optional packages": optional_rows(),
        "Disk and Hub": [*disk_rows(), hub_row()],
        "Matrix products, 512 x 2048 x 2048": [
            ("OpenBLAS", f"{blas.state}: {blas.message}"),
            ("float32", f"{gflops:.0f} GFLOP/s"),
            ("bfloat16", f"{half:.0f} GFLOP/s"),
        ],
        "Memory": _memory_rows(memory),
        **_kernel_sections(kernels),
        **_model_section(of_model, f"rank {rank}, {tokens} tokens"),
        "DoRA layer, 1024 x 1024, rank 8, against float64 NumPy": [
            (check.name, _layer_row(check)) for check in layers
        ],
    }
    checks = kernels.checks if kernels else []
    wrong = [check.name for check in (*layers, *checks) if not check.is_right]
    return Diagnosis(
        sections=sections,
        traps=find_traps(machine, memory, blas, gflops, layers, checks),
        wrong=tuple(wrong),
        is_slow=not machine.is_gpu and gflops < SLOW_GFLOPS,
        choices=kernels.choices if kernels else {},
    )


def _kernel_sections(
    kernels: Examination | None,
) -> dict[str, list[tuple[str, str]]]:
    if kernels is None:
        return {}
    return {
        "Kernels": kernel_rows(kernels),
        f"Ops, {kernels.sizes}": timing_rows(kernels),
        "Choice between kernels and plain MLX": choice_rows(kernels),
    }


def _model_section(
    choices: Choices | None, sizes: str
) -> dict[str, list[tuple[str, str]]]:
    return (
        {}
        if choices is None
        else {f"Kernels of the model, {sizes}": model_rows(choices)}
    )


def _layer_row(check: LayerCheck) -> str:
    verdict = "right" if check.is_right else "WRONG"
    return (
        f"{verdict}, error {check.error:.1e} (allowed {check.bound:.0e}); one token "
        f"{check.dora_us:.0f} us, plain layer {check.base_us:.0f} us"
    )


def _memory_rows(memory: Memory) -> list[tuple[str, str]]:
    def gb(size: int | None) -> str:
        return "unknown" if size is None else f"{size / 1e9:.1f} GB"

    rows = [
        ("total", gb(memory.total_bytes)),
        ("MLX's limit", gb(memory.mlx_limit_bytes)),
    ]
    if memory.recommended_bytes is not None:
        rows.append(("working set", f"{gb(memory.recommended_bytes)} recommended"))
    if memory.largest_buffer_bytes is not None:
        rows.append(("largest array", gb(memory.largest_buffer_bytes)))
    if memory.wired_limit_mb is not None:
        rows.append(("wired limit", f"{memory.wired_limit_mb} MB (0: the default)"))
    if memory.sleep_minutes is not None:
        rows.append(("sleep", f"after {memory.sleep_minutes} minutes (0: never)"))
    return rows
