from importlib import import_module
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import kernels
from mlx_dora.errors import DoRAError
from mlx_dora.kernels import QuantizedWeight, _source, choice, dispatch, plans
from mlx_dora.kernels.case import Case
from mlx_dora.kernels.measure import job_of
from tests.checks import to_numpy
from tests.kernels.device import Device

ROOT = Path(__file__).parents[2]
rescale_module = import_module("mlx_dora.kernels.rescale")
METAL_KERNEL = mx.fast.metal_kernel
BIG = mx.zeros((512, 512))


@pytest.mark.parametrize("name", ["metal", "cuda"])
def test_a_backend_that_is_not_here_is_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "device_backend", lambda: "reference")
    monkeypatch.setenv("MLX_DORA_KERNELS", name)
    dispatch.backend_of.cache_clear()
    with pytest.raises(DoRAError, match=f"{name}, but MLX's default device here is "):
        kernels.normalize_rows(BIG)
    dispatch.backend_of.cache_clear()


def test_an_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DORA_KERNELS", "triton")
    with pytest.raises(DoRAError, match="'triton'; expected one of auto, metal, cuda"):
        kernels.normalize_rows(BIG)


@pytest.mark.parametrize("value", ["", "auto", "reference"])
def test_a_cpu_runs_plain_mlx(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DORA_KERNELS", value)
    with mx.stream(mx.cpu):
        assert dispatch.chosen_backend() == "reference"
        assert dispatch.chosen_mode() == "reference"


@pytest.mark.parametrize(
    ("value", "mode"),
    [(None, "auto"), ("", "auto"), ("auto", "auto"), ("metal", "forced")],
)
def test_a_gpu_measures_unless_its_kernels_are_named(
    value: str | None, mode: str, gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("MLX_DORA_KERNELS", value)
    assert dispatch.chosen_backend() == "metal"
    assert dispatch.chosen_mode() == mode


def test_a_forced_kernel_takes_every_size_it_can(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    small = Case("adapted_norm", mx.float32, 3, 5, 2)
    assert choice.takes_kernel(small, job_of)
    for unfit in (
        small._replace(rank=513),
        small._replace(rows=0),
        small._replace(dtype=mx.int32),
    ):
        assert not choice.takes_kernel(unfit, job_of)
    monkeypatch.setenv("MLX_DORA_KERNELS", "reference")
    assert not choice.takes_kernel(small, job_of)


def test_a_wrong_result_of_the_real_op_is_caught(
    gpu: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    gpu.broken = {"normalize_rows"}
    weight = mx.random.normal((60, 60), key=mx.random.key(3))
    _, norm = kernels.normalize_rows(weight)
    assert mx.allclose(norm, mx.linalg.norm(weight, axis=1))
    assert "normalize_rows in float32 is wrong by 1.0e+00" in caplog.text
    gpu.broken = set()
    choice.forget()
    gpu.launches.clear()
    kernels.normalize_rows(weight)
    assert gpu.launches == {"normalize_rows": 2}  # a check, and the call


def test_a_gain_for_all_rows_stays_with_plain_mlx(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MAP has one gain per matrix, which the kernel would read as one per row."""
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    y, h, up = mx.ones((3, 4)), mx.ones((3, 2)), mx.ones((2, 4))
    out = rescale_module.rescale(y, h, up, mx.array(2.0), None)
    assert (out == 6).all()
    assert gpu.launches == {}


@pytest.mark.parametrize("has_offset", [False, True])
def test_vmap_over_a_kernel_runs_plain_mlx(
    has_offset: bool, gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    y, h = mx.random.normal((5, 3, 4)), mx.random.normal((5, 3, 2))
    up, gain = mx.random.normal((2, 4)), mx.random.normal((4,))
    offset = gain if has_offset else None

    def op(y: mx.array, h: mx.array) -> mx.array:
        return rescale_module.rescale(y, h, up, gain, offset)

    expected = to_numpy(op(y, h))
    launches = dict(gpu.launches)
    assert np.allclose(to_numpy(mx.vmap(op)(y, h)), expected, atol=1e-6)
    swapped = mx.vmap(op, in_axes=(1, 1))(y.swapaxes(0, 1), h.swapaxes(0, 1))
    assert np.allclose(to_numpy(swapped), expected, atol=1e-6)
    gradient = mx.grad(lambda y: mx.vmap(op)(y, h).sum())(y)
    assert np.allclose(to_numpy(gradient), to_numpy(gain), atol=1e-6)
    checked = {k: n for k, n in gpu.launches.items() if n != launches.get(k)}
    assert len(checked) <= 3  # the check of the smaller case, and no call of vmap


def test_without_metal_mlx_refuses_and_plain_mlx_serves(
    gpu: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if mx.metal.is_available():
        pytest.skip("it runs here")
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    monkeypatch.setattr(mx.fast, "metal_kernel", METAL_KERNEL)
    weight = mx.random.normal((600, 600), key=mx.random.key(3))
    a, b = mx.ones((600, 2)), mx.ones((2, 600))
    norm = kernels.adapted_norm(weight, a, b, 0.5)
    expected = np.linalg.norm(to_numpy(weight) + 1.0, axis=1)
    assert np.allclose(to_numpy(norm), expected, rtol=1e-5)
    assert caplog.text.count("does not run") == 1


def test_a_shape_error_is_the_same_with_a_kernel(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    with pytest.raises(DoRAError, match="magnitude has shape"):
        kernels.normalize_rows(BIG, mx.ones(3))
    with pytest.raises(DoRAError, match="do not fit a weight of shape"):
        kernels.adapted_norm(BIG, mx.ones((5, 2)), mx.ones((2, 512)), 1.0)
    with pytest.raises(DoRAError, match="do not fit a weight of shape"):
        kernels.fused_weight(BIG, mx.ones((5, 2)), mx.ones((2, 512)), 1.0, BIG[0])
    with pytest.raises(DoRAError, match="h has shape"):
        kernels.dora_scale(BIG, BIG, mx.ones((2, 512)), 1.0, BIG[0], BIG[0])


def test_formats_without_scale_and_bias_stay_with_the_reference(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    packed, scales, *_ = mx.quantize(mx.ones((600, 512)), 32, 4, mode="mxfp4")
    weight = QuantizedWeight(
        weight=packed, scales=scales, biases=None, group_size=32, bits=4, mode="mxfp4"
    )
    a, b = mx.zeros((512, 2)), mx.zeros((2, 600))
    assert kernels.adapted_norm(weight, a, b, 1.0).shape == (600,)
    assert kernels.fused_weight(weight, a, b, 1.0, mx.ones(600)).shape == (600, 512)
    assert gpu.launches == {}


def test_sources_may_lie_in_the_package_or_in_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert _source.source_folder() == ROOT / "metal"
    monkeypatch.setattr(_source, "_PLACES", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(DoRAError, match="the Metal sources are in neither"):
        _source.source_folder()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "common.h").touch()
    assert _source.source_folder() == tmp_path / "b"


def test_comments_become_blanks_line_for_line() -> None:
    text = "a; // thread_position_in_grid\n/* x_shape\n y */ b; /**/ c / d;\n"
    blank = _source.blank_comments(text)
    assert blank.split() == ["a;", "b;", "c", "/", "d;"]
    assert [len(line) for line in blank.splitlines()] == [
        len(line) for line in text.splitlines()
    ]


def numbers(launch: plans.Launch) -> dict[str, int]:
    return {name: v for name, v in launch.template if isinstance(v, int)}


def launches() -> list[tuple[str, plans.Launch]]:
    made: list[tuple[str, plans.Launch]] = []
    for out in (1, 3, 31, 33, 1000, 4096, 151936):
        for width in (1, 31, 33, 1000, 4096, 14336):
            shape = (out, width)
            made.append(
                ("normalize_rows", plans.plan_normalize_rows(shape, mx.float16))
            )
            made.append(
                ("backward", plans.plan_dora_scale_backward(shape, mx.float16, True))
            )
            made.append(("columns", plans.plan_dora_scale_columns(2, 5, width)))
            for r in (1, 8, 64, 512):
                fused = plans.plan_fused_weight(shape, r, mx.float16)
                made.append(("fused_weight", fused))
                norm = plans.plan_adapted_norm(shape, r, mx.float16)
                made.append(("adapted_norm", norm))
                scaled = plans.plan_dora_scale(shape, r, mx.float16, False)
                made.append(("dora_scale", scaled))
    return made


def test_every_chip_accepts_every_launch() -> None:
    for name, launch in launches():
        threads = int(np.prod(launch.threadgroup))
        assert threads % 32 == 0, name
        assert threads <= 256, name
        for whole, part in zip(launch.grid, launch.threadgroup, strict=True):
            assert whole % part == 0, name
            assert 0 < whole < 2**31, name
        assert max(launch.grid[1:]) <= 65535, name  # CUDA's limit


def test_registers_and_threadgroup_memory_stay_bounded() -> None:
    for name, launch in launches():
        facts = numbers(launch)
        rows, steps = facts.get("ROWS", 1), facts.get("STEPS") or 1
        if name == "normalize_rows":
            assert steps * 16 <= 128  # bytes
        if name == "fused_weight":
            assert rows * steps * 4 <= 64  # floats
        if name in ("fused_weight", "dora_scale"):
            assert rows * facts["R"] <= 4096, name  # floats: 16 KB


@pytest.mark.parametrize(
    ("dtype", "longest"), [(mx.float16, 16384), (mx.float32, 8192)]
)
def test_long_rows_stay_in_registers(dtype: mx.Dtype, longest: int) -> None:
    for width in (1, 4096, 4097, longest, longest + 1):
        rows = plans.plan_normalize_rows((7, width), dtype)
        assert bool(numbers(rows)["STEPS"]) == (width <= longest), width
        fused = plans.plan_fused_weight((7, width), 8, dtype)
        assert bool(numbers(fused)["STEPS"]) == (width <= 16384), width
    past = plans.plan_fused_weight((7, 16385), 8, dtype)
    assert not numbers(past)["STEPS"]


def test_heads_name_the_buffers_of_the_table() -> None:
    for name, kernel in dispatch.KERNELS.items():
        head = (ROOT / "metal" / f"{name}.metal").read_text().split("\n  ")[0]
        comment = " ".join(
            line.removeprefix("//").strip() for line in head.splitlines()
        )
        comment, template = comment.split("template:")
        inputs, outputs = comment.split("in:", 1)[1].split("out: ")
        for part, names in ((inputs, kernel.inputs), (outputs, kernel.outputs)):
            places = [part.index(f"{each} ") for each in names]
            assert places == sorted(places), name
        assert "launch:" in template, name
        assert "reference: mlx_dora/kernels/naive.py::" in template, name


def test_relative_error_keeps_a_nan() -> None:
    pair = [mx.array([1.0, 2.0]), mx.array([float("nan"), 1.0])]
    assert np.isnan(dispatch.relative_error(pair, [mx.ones(2), mx.ones(2)]))
    assert dispatch.relative_error(mx.zeros(3), mx.zeros(3)) == 0


@pytest.mark.compiled
def test_the_first_use_may_fall_into_a_compiled_gradient(
    gpu: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    weight, y = mx.ones((4, 6)), mx.ones((3, 4))
    a, b, m = mx.ones((6, 2)), mx.ones((2, 4)), mx.arange(4.0)

    def loss(y: mx.array, a: mx.array, b: mx.array, m: mx.array) -> mx.array:
        norm = kernels.adapted_norm(weight, a, b, 0.5)
        return kernels.dora_scale(y, y[:, :2], b, 0.5, m, norm).sum()

    step = mx.compile(mx.grad(mx.checkpoint(loss), argnums=(0, 1, 2, 3)))
    mx.eval(step(y, a, b, m))
    scale = {"dora_scale", "dora_scale_backward", "dora_scale_columns"}
    assert {*gpu.launches} >= {"adapted_norm", *scale}
    assert caplog.text == ""
