"""Compiles every kernel as CUDA for sm_90, and looks at the text."""

import re
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dora.kernels import _source, dispatch, plans
from tests.kernels.cuda_compilers import COMPILERS
from tests.kernels.cuda_text import Use, machine_code, sources

FLOAT = mx.float32


def uses() -> Iterator[Use]:
    """Every kernel in every dtype and bit width; long rows; a rank past the tiles."""
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        for shape, r in (((4096, 4096), 8), ((65, 20_000), 129)):
            rows = plans.plan_normalize_rows(shape, dtype)
            yield Use("normalize_rows", (dtype, FLOAT), rows)
            norm = plans.plan_adapted_norm(shape, r, dtype)
            yield Use("adapted_norm", (dtype, FLOAT, FLOAT), norm)
            fused = plans.plan_fused_weight(shape, r, dtype)
            yield Use("fused_weight", (dtype, FLOAT, FLOAT, FLOAT), fused)
            scale = plans.plan_dora_scale(shape, r, dtype, r == 8)
            yield Use("dora_scale", (dtype, dtype, FLOAT, FLOAT, FLOAT), scale)
            back = plans.plan_dora_scale_backward(shape, dtype, r == 8)
            yield Use("dora_scale_backward", (dtype, dtype, FLOAT, FLOAT), back)
    for bits in (2, 3, 4, 5, 6, 8):
        plan = plans.plan_adapted_norm_packed((4096, 4096), 8, bits, 64)
        dtype = mx.float16 if bits % 2 else mx.bfloat16
        dtypes = (mx.uint32, dtype, dtype, FLOAT, FLOAT)
        yield Use("adapted_norm_packed", dtypes, plan)
    columns = plans.plan_dora_scale_columns(2, 3, 77)
    yield Use("dora_scale_columns", (FLOAT, FLOAT), columns)
    total = plans.plan_adapted_norm_total(2, 3, 77)
    yield Use("adapted_norm_total", (FLOAT,), total)


def test_no_word_of_metal_is_left() -> None:
    assert set(sources()) == set(dispatch.KERNELS)
    for name, made in sources().items():
        text = made["header"].split("#define MLX_DORA_WIDE_H")[1] + made["source"]
        left = re.findall(r"\b(?:device|constant|thread|threadgroup)\b", text)
        assert left == [], name
        declared = _source.read_source(f"{name}.metal").count("  threadgroup ")
        assert made["source"].count("  __shared__ ") == declared


@pytest.mark.skipif(
    not COMPILERS, reason="no CUDA compiler: pip install -e '.[cuda-check]'"
)
def test_every_kernel_compiles_for_sm_90(tmp_path: Path) -> None:
    everything = list(uses())
    assert {use.kernel for use in everything} == set(dispatch.KERNELS)
    code = machine_code(everything, tmp_path)
    spilling = [
        (use.kernel, use.launch.template)
        for use, kernel in zip(everything, code, strict=True)
        if kernel.spills
    ]
    assert spilling == []
