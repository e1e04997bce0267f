"""The stand-in for Metal itself, by small kernels whose results are known."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_host.host import Host
from tests.metal_host.records import Record
from tests.metal_host.translate import unit

Launch = Callable[..., list[mx.array]]


def test_wide_accesses_are_in_every_kernel_of_a_unit(host: Host) -> None:
    """Each kernel's macros are undefined after it."""
    text = "#ifndef DORA_WIDE\n#define DORA_WIDE 0\n#endif\n"
    body = f"{text}[[kernel]] void k(\n  device float* a [[buffer(0)]]) {{\n}}\n"
    shape = ((1,), mx.float32)
    records = [
        Record(f"k{i}", f"// {i}\n{body}", (1, 1, 1), (1, 1, 1), (), (), (shape,))
        for i in range(2)
    ]
    assert unit(records, is_wide=True).count("#define DORA_WIDE 1") == 2
    assert unit(records).count("#define DORA_WIDE 1") == 0


@pytest.fixture
def launch(host: Host) -> Launch:
    """Run a body over one row of threads; each output is a shape and a dtype."""

    def run(
        body, inputs, outputs, threads=64, mode="check", **options
    ) -> list[mx.array]:
        names = [chr(ord("a") + i) for i in range(len(inputs))]
        with host.running(mode, **options):
            kernel = mx.fast.metal_kernel(
                name="probe",
                input_names=names,
                output_names=[f"o{i}" for i in range(len(outputs))],
                source=body,
            )
            return kernel(  # pyright: ignore[reportCallIssue] - the stubs say object
                inputs=inputs,
                grid=(threads, 1, 1),
                threadgroup=(min(threads, 64), 1, 1),
                output_shapes=[shape for shape, _ in outputs],
                output_dtypes=[dtype for _, dtype in outputs],
            )

    return run


def test_conversions_are_bit_exact(launch: Launch):
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 14, dtype=np.uint32)
    values = mx.array(bits).view(mx.float32)
    values = mx.where(mx.isnan(values), mx.array(1.0), values)
    n = values.size
    half, brain = launch(
        "uint i = thread_position_in_grid.x; o0[i] = half(a[i]); o1[i] = bfloat(a[i]);",
        [values],
        [((n,), mx.float16), ((n,), mx.bfloat16)],
        n,
    )
    assert mx.array_equal(half, values.astype(mx.float16))
    assert mx.array_equal(brain, values.astype(mx.bfloat16))


def test_simd_functions(launch: Launch):
    x = mx.arange(64, dtype=mx.float32)
    body = """
      uint i = thread_position_in_grid.x;
      o0[i] = simd_sum(a[i]);
      o0[64 + i] = simd_max(a[i]);
      o0[128 + i] = simd_shuffle_xor(a[i], ushort(5));
      o0[192 + i] = simd_shuffle_down(a[i], ushort(3));
      o0[256 + i] = simd_broadcast(a[i], ushort(2));
      o0[320 + i] = float(simdgroup_index_in_threadgroup * 100
                          + thread_index_in_simdgroup);
    """
    (out,) = launch(body, [x], [((6, 64), mx.float32)])
    got, i = np.array(out), np.arange(64)
    lane, group = i % 32, i // 32
    expected = [
        496 + 1024 * group,
        31 + 32 * group,
        i ^ 5,
        np.where(lane < 29, i + 3, i),
        2 + 32 * group,
        100 * group + lane,
    ]
    np.testing.assert_array_equal(got, np.stack(expected))


FINDINGS = {
    "race": "threadgroup float t[64]; uint i = thread_position_in_threadgroup.x;"
    "t[0] = float(i); o0[i] = a[i];",
    "uninitialised-read": "threadgroup float t[64];"
    "uint i = thread_position_in_threadgroup.x; o0[i] = a[i] + t[i];",
    "out-of-bounds": "uint i = thread_position_in_grid.x; o0[i] = a[i + 1];",
    "unwritten-output": "uint i = thread_position_in_grid.x; if (i > 0) o0[i] = a[i];",
    "barrier-partial": "uint i = thread_position_in_grid.x; o0[i] = a[i];"
    "if (i < 32) return; threadgroup_barrier(mem_flags::mem_threadgroup);",
    "barrier-divergence": "uint i = thread_position_in_grid.x; o0[i] = a[i];"
    "if (i < 32) { threadgroup_barrier(mem_flags::mem_threadgroup); }\n"
    "else { threadgroup_barrier(mem_flags::mem_threadgroup); }",
    "deadlock": "uint i = thread_position_in_grid.x; float s = 0.0f;"
    "if (i < 16) { s = simd_sum(a[i]); }"
    "else { threadgroup_barrier(mem_flags::mem_threadgroup); } o0[i] = s;",
    "threadgroup-memory": "threadgroup float t[9000];"
    "uint i = thread_position_in_grid.x; t[i] = a[i]; o0[i] = t[i];",
}


@pytest.mark.parametrize("finding", FINDINGS)
def test_each_kind_of_finding(finding: str, launch: Launch, host: Host):
    launch(FINDINGS[finding], [mx.ones((64,))], [((64,), mx.float32)])
    assert finding in host.findings


def test_a_race_is_found_in_every_order(launch: Launch, host: Host):
    body = """
      threadgroup float t[64];
      uint i = thread_position_in_threadgroup.x;
      t[i] = a[i];
      o0[i] = t[(i + 32) % 64];
    """
    for seed in range(6):
        launch(body, [mx.ones((64,))], [((64,), mx.float32)], seed=seed)
        assert "race" in host.findings, seed
