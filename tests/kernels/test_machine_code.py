"""What the sm_90 machine code says of speed, where no GPU is.

Registers, spills, widths of accesses, barriers, and threadgroups that a multiprocessor
of an H100 or H200 holds. They say what the hardware is asked to do, not how fast it is.
"""

import mlx.core as mx
import pytest

from mlx_dora.kernels import plans
from tests.kernels.cuda_compilers import COMPILERS
from tests.kernels.cuda_text import Use, machine_code
from tests.kernels.machine_code import MachineCode, resident_threadgroups

pytestmark = pytest.mark.skipif(
    not COMPILERS, reason="no CUDA compiler: pip install -e '.[cuda-check]'"
)
CORES = 132  # of an H100 and an H200
FLOAT, HALF = mx.float32, mx.bfloat16
SQUARE = (4096, 4096)


def uses() -> dict[str, Use]:
    """The kernels that a run spends its time in, by name, dtype and rank."""
    found = {}
    for dtype, size in ((HALF, "16-bit"), (FLOAT, "32-bit")):
        rows = plans.plan_normalize_rows(SQUARE, dtype)
        found[f"normalize_rows {size}"] = Use("normalize_rows", (dtype, FLOAT), rows)
        for has_offset in (False, True):
            back = plans.plan_dora_scale_backward(
                SQUARE, dtype, has_offset, cores=CORES
            )
            found[f"backward {size}{' offset' * has_offset}"] = Use(
                "dora_scale_backward", (dtype, dtype, FLOAT, FLOAT), back
            )
        for r in (8, 64):
            norm = plans.plan_adapted_norm(SQUARE, r, dtype, cores=CORES)
            dtypes = (dtype, FLOAT, FLOAT)
            found[f"dense norm {size} r{r}"] = Use("adapted_norm", dtypes, norm)
            fused = plans.plan_fused_weight(SQUARE, r, dtype, cores=CORES)
            dtypes = (dtype, FLOAT, FLOAT, FLOAT)
            found[f"fused {size} r{r}"] = Use("fused_weight", dtypes, fused)
            for has_offset in (False, True):
                scale = plans.plan_dora_scale(SQUARE, r, dtype, has_offset, cores=CORES)
                dtypes = (dtype, dtype, FLOAT, FLOAT, FLOAT)
                name = f"scale {size} r{r}{' offset' * has_offset}"
                found[name] = Use("dora_scale", dtypes, scale)
    packed = plans.plan_adapted_norm_packed(SQUARE, 8, 4, 64, cores=CORES)
    dtypes = (mx.uint32, HALF, HALF, FLOAT, FLOAT)
    found["packed r8"] = Use("adapted_norm_packed", dtypes, packed)
    return found


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MachineCode]:
    """Every use in one compilation, which takes a few seconds."""
    found = uses()
    made = machine_code(list(found.values()), tmp_path_factory.mktemp("cuda"))
    return dict(zip(found, made, strict=True))


def of(code: dict[str, MachineCode], prefix: str) -> dict[str, MachineCode]:
    chosen = {name: each for name, each in code.items() if name.startswith(prefix)}
    assert chosen
    return chosen


# Registers that leave the multiprocessor enough simdgroups (65,536 registers): 32 of
# them at 64, 20 at 96, 16 at 128. With float32 dora_scale holds y as it was read, too.
REGISTERS = {
    "normalize_rows": 56,
    "dense norm": 112,
    "packed": 96,
    "fused": 128,
    "scale 16-bit": 64,
    "scale 32-bit": 72,
    "backward": 64,
}


@pytest.mark.parametrize("prefix", REGISTERS)
def test_registers(code: dict[str, MachineCode], prefix: str) -> None:
    used = {name: each.registers for name, each in of(code, prefix).items()}
    assert max(used.values()) <= REGISTERS[prefix], used


def test_nothing_is_spilled(code: dict[str, MachineCode]) -> None:
    assert {name: each.spills for name, each in code.items() if each.spills} == {}


# Bytes that a thread moves at once: of what it loads, and of what it stores.
WIDTHS = {
    "normalize_rows": (16, 16),
    "dense norm": (16, 4),  # one sum a row
    "fused 16-bit": (16, 8),  # 4 columns, so that A's 16 bytes lie side by side
    "fused 32-bit": (16, 16),
    "scale 16-bit": (16, 8),
    "scale 32-bit": (16, 16),
    "backward": (16, 16),
}


@pytest.mark.parametrize("prefix", WIDTHS)
def test_accesses_are_wide(code: dict[str, MachineCode], prefix: str) -> None:
    for name, each in of(code, prefix).items():
        assert (each.widest("LDG"), each.widest("STG")) == WIDTHS[prefix], name


def test_four_columns_of_half_precision_are_read_at_once(
    code: dict[str, MachineCode],
) -> None:
    for prefix, rows in (("scale 16-bit", 8), ("fused 16-bit", 16)):
        for name, each in of(code, prefix).items():
            assert each.counts["LDG.8"] == each.counts["STG.8"] == rows, name
    # The norm reads 8 columns of 4 rows, or above rank 16 4 columns of 8.
    assert code["dense norm 16-bit r8"].counts["LDG.8"] == 0
    assert code["dense norm 16-bit r64"].counts["LDG.8"] == 8


def test_tiles_are_read_16_bytes_at_a_time(code: dict[str, MachineCode]) -> None:
    for prefix in ("dense norm", "packed"):
        for name, each in of(code, prefix).items():
            tile = {key for key in each.counts if key[:3] in ("LDS", "STS")}
            assert tile == {"LDS.16", "STS.16"}, name


@pytest.mark.parametrize(("name", "barriers"), [("r8", 1), ("r64", 2)])
def test_barriers_of_the_norm(
    code: dict[str, MachineCode], name: str, barriers: int
) -> None:
    """One for the strip of A up to rank 16; two for each 16 ranks beyond."""
    for size in ("16-bit", "32-bit"):
        assert code[f"dense norm {size} {name}"].counts["BAR"] == barriers


def test_a_multiprocessor_is_filled(code: dict[str, MachineCode]) -> None:
    """Four threadgroups of each launch, and 16 simdgroups where registers allow."""
    for name, use in uses().items():
        threads = use.launch.threadgroup[0]
        resident = resident_threadgroups(code[name], threads)
        share = min(resident, use.threadgroups / CORES)
        assert use.threadgroups >= 4 * CORES, name
        assert share * threads / 32 >= 16, name
