"""Launches for several devices: enough threadgroups, few variants, legal sizes."""

from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlx_dora.kernels import cores, plans
from mlx_dora.kernels.plans import Launch

HALF = mx.bfloat16
# M1, M4 Max, M3 Ultra, H100 and H200, B200.
DEVICES = (8, 40, 80, 132, 148)
# Adapted matrices of a model of 1B parameters (Llama 3.2), (out, in).
MATRICES = ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192))


def threadgroups(launch: Launch) -> int:
    counts = [g // t for g, t in zip(launch.grid, launch.threadgroup, strict=True)]
    return counts[0] * counts[1] * counts[2]


def large_launches(n: int, count: int) -> Iterator[tuple[str, Launch]]:
    """Every kernel that reads or writes a matrix of n² values."""
    shape, r = (n, n), 8
    yield "normalize_rows", plans.plan_normalize_rows(shape, HALF)
    yield "adapted_norm", plans.plan_adapted_norm(shape, r, HALF, cores=count)
    packed = plans.plan_adapted_norm_packed(shape, r, 4, 64, cores=count)
    yield "adapted_norm_packed", packed
    yield "fused_weight", plans.plan_fused_weight(shape, r, HALF, cores=count)
    yield "dora_scale", plans.plan_dora_scale(shape, r, HALF, False, cores=count)
    back = plans.plan_dora_scale_backward(shape, HALF, False, cores=count)
    yield "dora_scale_backward", back


@pytest.mark.parametrize("count", DEVICES)
@pytest.mark.parametrize("n", [2048, 4096, 8192])
def test_every_core_gets_four_threadgroups(n: int, count: int) -> None:
    few = {
        name: threadgroups(launch)
        for name, launch in large_launches(n, count)
        if threadgroups(launch) < 4 * count
    }
    # 2048 x 2048 packed weights are 1024 tiles of 16 x 256 values: 6.9 a core of 148.
    assert few == {}


def test_no_more_threadgroups_than_the_traffic_allows() -> None:
    small = dict(large_launches(4096, 8))
    large = dict(large_launches(4096, 148))
    for name in ("adapted_norm", "adapted_norm_packed", "dora_scale_backward"):
        assert threadgroups(small[name]) < threadgroups(large[name])
        assert threadgroups(small[name]) <= 16 * 8
    for launch in (*small.values(), *large.values()):
        threads = launch.threadgroup[0]
        assert launch.threadgroup == (threads, 1, 1)
        assert threads % 32 == 0
        assert 32 <= threads <= 256
        assert all(
            g % t == 0 for g, t in zip(launch.grid, launch.threadgroup, strict=True)
        )


@pytest.mark.parametrize("count", DEVICES)
def test_a_first_step_needs_five_variants(count: int) -> None:
    variants = set()
    for out, width in MATRICES:
        norm = plans.plan_adapted_norm((out, width), 8, HALF, cores=count)
        variants.add(("adapted_norm", norm.template))
        total = plans.plan_adapted_norm_total(*norm.output_shapes[0])
        variants.add(("adapted_norm_total", total.template))
        for tokens in (128, 2048):
            shape = (tokens, out)
            scale = plans.plan_dora_scale(shape, 8, HALF, False, cores=count)
            variants.add(("dora_scale", scale.template))
            back = plans.plan_dora_scale_backward(shape, HALF, False, cores=count)
            variants.add(("dora_scale_backward", back.template))
            columns = plans.plan_dora_scale_columns(*back.output_shapes[1])
            variants.add(("dora_scale_columns", columns.template))
    assert len(variants) == 5


@pytest.mark.parametrize("count", DEVICES)
@pytest.mark.parametrize("tokens", [1, 2, 17, 128, 2048, 16_384])
@pytest.mark.parametrize("out", [1, 512, 1000, 14_336])
def test_chunks_and_strips_cover_every_value_once(
    count: int, tokens: int, out: int
) -> None:
    back = plans.plan_dora_scale_backward((tokens, out), HALF, False, cores=count)
    chunks = back.output_shapes[1][1]
    length = -(-tokens // chunks)  # as the kernel computes it
    assert length * chunks >= tokens
    assert length * (chunks - 1) < tokens
    assert back.grid[1] * 256 >= out > (back.grid[1] - 1) * 256
    norm = plans.plan_adapted_norm((out, tokens), 8, HALF, cores=count)
    _, strips, rows = norm.output_shapes[0]
    assert (strips * 256 >= tokens > (strips - 1) * 256, rows) == (True, out)
    groups = norm.grid[0] // norm.threadgroup[0]
    units = -(-out // 16)
    rounds = -(-units // groups)
    assert groups * rounds * 16 >= out


@pytest.mark.parametrize(
    ("architecture", "count"),
    [
        ("applegpu_g13g", 10),
        ("applegpu_g13s", 20),
        ("applegpu_g14c", 40),
        ("applegpu_g15d", 80),
        ("applegpu_g16p", 6),
        ("applegpu_g99z", cores.UNKNOWN),
        ("x86_64", cores.UNKNOWN),
        ("", cores.UNKNOWN),
    ],
)
def test_cores_of_an_apple_chip(architecture: str, count: int) -> None:
    assert cores.apple_cores(architecture) == count


def test_cores_without_a_gpu_or_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores._multiprocessors("libno-such-driver.so.1") == 0
    with monkeypatch.context() as patch:
        patch.setattr(cores, "_multiprocessors", lambda library: 0)
        assert cores._cores_of("sm_90") == cores.UNKNOWN
        patch.setattr(cores, "_multiprocessors", lambda library: 132)
        assert cores._cores_of("sm_90") == 132
    if mx.default_device().type != mx.gpu:
        assert cores.device_cores() == cores.UNKNOWN


def test_the_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def device_info() -> dict[str, str]:
        asked.append("")
        return {"architecture": "applegpu_g13s"}

    monkeypatch.setattr(cores.mx, "device_info", device_info)
    monkeypatch.setattr(cores.mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    cores._gpu_cores.cache_clear()
    assert [cores.device_cores() for _ in range(3)] == [20] * 3
    cores._gpu_cores.cache_clear()
    assert len(asked) == 1
