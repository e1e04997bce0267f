"""Offsets past 2^32 elements: the last threadgroup of huge, mostly untouched arrays."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.kernels import plans as table
from tests.checks import BOUNDS, to_numpy
from tests.metal_host import cases
from tests.metal_host.execute import ZERO_PAGES, Sparse
from tests.metal_host.host import Host, call
from tests.metal_host.mutants import edited

ROWS, WIDTH, R = (1 << 20) + 8, 4096, 4  # 2^32 + 2^15 elements
END = 32  # rows that are not zero, at the end
SCALE = 0.5
STRIP = 256  # columns of a threadgroup that reads 16 bytes a thread, in half precision
CORES = 1 << 16  # so many that the last threadgroup has little to do


@dataclass(frozen=True)
class Launched:
    """What the last threadgroup gave, and the truth for the last rows."""

    output: mx.array
    truth: np.ndarray
    bound: float


def last_rows(width: int, seed: int) -> tuple[mx.array, Sparse]:
    """The last rows of a huge float16 matrix, and the matrix."""
    values = np.random.default_rng(seed).standard_normal((END, width))
    rows = mx.array(values.astype(np.float16))
    return rows, Sparse((ROWS, width), (ROWS - END) * width, rows)


def huge(width: int) -> mx.array:
    return mx.zeros((ROWS, width), dtype=mx.float16)  # never evaluated


def run_last(
    host: Host,
    kernel: str,
    launch: table.Launch,
    inputs: list[mx.array],
    sparse: dict[int, Sparse],
) -> list[mx.array]:
    """The outputs' ends; only the last threadgroup runs."""
    columns, rows, _ = (
        g // t for g, t in zip(launch.grid, launch.threadgroup, strict=True)
    )
    last = columns * rows
    assert last < 1 << 32
    with host.running(
        "plain", groups=(last - 1, last), sparse=sparse, flags=ZERO_PAGES
    ):
        ends = call(kernel, launch, inputs)
    assert host.findings == {}
    return ends


def normalize_rows(host: Host) -> Launched:
    rows, matrix = last_rows(WIDTH, 1)
    launch = table.plan_normalize_rows((ROWS, WIDTH), mx.float16)
    magnitude = mx.ones((ROWS,))
    inputs = [huge(WIDTH), magnitude]
    rescaled, _ = run_last(host, "normalize_rows", launch, inputs, {0: matrix})
    truth = to_numpy(rows)[-1] / np.linalg.norm(to_numpy(rows)[-1])
    return Launched(rescaled[-WIDTH:], truth, BOUNDS[mx.float16])


def low_rank() -> tuple[mx.array, Sparse, np.ndarray]:
    """A, s·B (huge, its last columns) and s·(BA) of the last rows."""
    rng = np.random.default_rng(2)
    a = mx.array(rng.standard_normal((WIDTH, R)).astype(np.float32) / 64)
    # B is (R, out): its last row holds the last columns, the others stay zero.
    b = mx.array(SCALE * rng.standard_normal(END).astype(np.float32))
    update = np.outer(to_numpy(b), to_numpy(a)[:, R - 1])
    return a, Sparse((R, ROWS), R * ROWS - END, b), update


def adapted_norm(host: Host) -> Launched:
    """The last strip of columns, of the last rows."""
    rows, matrix = last_rows(WIDTH, 3)
    a, b, update = low_rank()
    launch = table.plan_adapted_norm((ROWS, WIDTH), R, mx.float16, cores=CORES)
    inputs = [huge(WIDTH), a, mx.zeros((R, ROWS))]
    (sums,) = run_last(host, "adapted_norm", launch, inputs, {0: matrix, 2: b})
    truth = np.square(to_numpy(rows) + update)[-8:, -STRIP:].sum(axis=1)
    return Launched(sums[-8:], truth, BOUNDS[mx.float32])


def fused_weight(host: Host) -> Launched:
    rows, matrix = last_rows(WIDTH, 4)
    a, b, update = low_rank()
    launch = table.plan_fused_weight((ROWS, WIDTH), R, mx.float16)
    inputs = [huge(WIDTH), a.T, mx.zeros((R, ROWS)), mx.ones((ROWS,))]
    (fused,) = run_last(host, "fused_weight", launch, inputs, {0: matrix, 2: b})
    full = (to_numpy(rows) + update)[-1]
    truth = full / np.linalg.norm(full)
    return Launched(fused[-WIDTH:], truth, BOUNDS[mx.float16])


def dora_scale(host: Host) -> Launched:
    y, tokens = last_rows(WIDTH, 5)
    h, low = last_rows(R, 6)
    up = mx.array(np.random.default_rng(7).standard_normal((R, WIDTH)), mx.float32)
    ones = mx.ones((WIDTH,))
    launch = table.plan_dora_scale((ROWS, WIDTH), R, mx.float16, False)
    inputs = [huge(WIDTH), huge(R), up, ones, ones]
    (out,) = run_last(host, "dora_scale", launch, inputs, {0: tokens, 1: low})
    full = to_numpy(y) + to_numpy(h) @ to_numpy(up)
    last = launch.threadgroup[0] * 4  # columns of the last threadgroup
    return Launched(out[-last:], full[-1, -last:], BOUNDS[mx.float16])


def dora_scale_backward(host: Host) -> Launched:
    dy, tokens = last_rows(WIDTH, 8)
    ones = mx.ones((WIDTH,))
    launch = table.plan_dora_scale_backward(
        (ROWS, WIDTH), mx.float16, False, cores=CORES
    )
    inputs = [huge(WIDTH), huge(WIDTH), 2 * ones, ones]
    sparse = {0: tokens, 1: tokens}
    scaled, _ = run_last(host, "dora_scale_backward", launch, inputs, sparse)
    return Launched(scaled[-128:], 2 * to_numpy(dy)[-1, -128:], BOUNDS[mx.float16])


LARGE = [normalize_rows, adapted_norm, fused_weight, dora_scale, dora_scale_backward]


@pytest.mark.parametrize("launched", LARGE, ids=lambda f: f.__name__)
def test_offsets_past_32_bits(launched, host: Host):
    result = launched(host)
    assert cases.worst_error(result.output, result.truth) <= result.bound


@pytest.mark.parametrize(
    ("launched", "file"),
    [
        *((each, f"{each.__name__}.metal") for each in LARGE if each != adapted_norm),
        (adapted_norm, "common.h"),
        (fused_weight, "common.h"),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_a_32_bit_offset_is_caught(launched, file: str, host: Host):
    def narrow(text: str) -> str:
        assert "size_t(row" in text
        return text.replace("size_t(row", "(row")

    with edited(file, narrow):
        result = launched(host)
    assert not cases.worst_error(result.output, result.truth) <= result.bound


def test_row_offsets_of_a_packed_weight_are_64_bits_wide(host: Host):
    rows = 1 << 23  # of 512 words: 2^32, with 32 more rows on top
    out, width, bits, group = rows + END, 4096, 4, 64
    dense = mx.random.normal((END, width), key=mx.random.key(9)).astype(mx.float16)
    packed = mx.quantize(dense, group_size=group, bits=bits)
    base = cases.unpack(*packed, bits=bits, group=group)
    truth = np.square(base[-table.PACKED_TILE.rows :, -STRIP:]).sum(axis=1)
    launch = table.plan_adapted_norm_packed(
        (out, width), 1, bits, group, cores=16 * CORES
    )
    inputs = [mx.zeros((out, p.shape[1]), dtype=p.dtype) for p in packed]
    inputs += [mx.zeros((width, 1)), mx.zeros((1, out))]
    sparse = {
        i: Sparse((out, p.shape[1]), rows * p.shape[1], p) for i, p in enumerate(packed)
    }
    sparse[4] = Sparse((1, out), 0, mx.zeros((1,)))
    (sums,) = run_last(host, "adapted_norm_packed", launch, inputs, sparse)
    last = sums[-table.PACKED_TILE.rows :]
    assert cases.worst_error(last, truth) <= BOUNDS[mx.float32]
