"""Runs whole ops and a model through the kernels on an emulated device."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.nn.utils import checkpoint
from mlx.utils import tree_flatten, tree_map

from mlx_dora import DoRAConfig, DoRALinear, apply_dora, fuse_dora, kernels
from mlx_dora.kernels import choice, dispatch, plain
from mlx_dora.kernels.case import Case
from mlx_dora.kernels.measure import job_of
from mlx_dora.kernels.trial import check
from mlx_dora.matrix.weight import row_blocks
from mlx_dora.train.run.start import trainable_tensors
from tests.checks import assert_close, to_numpy
from tests.metal_host.build import COMPILER, Builder
from tests.metal_host.host import Host, launched

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ and Linux")
PREFIX = "custom_kernel_mlx_dora_"
CONFIG = DoRAConfig(rank=4, scale=2.0, num_layers=2, keys=("self_attn.q_proj",))
TOKENS = mx.array([[1, 5, 9, 200, 7, 3, 11, 40], [2, 2, 8, 64, 30, 31, 5, 17]])


@pytest.fixture(scope="module")
def builder(kept_folder: Callable[[str], Path]) -> Builder:
    """Makes the kernels' programs."""
    return Builder(kept_folder("metal_host"))


@pytest.fixture
def device(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Every call goes to its kernel, which must run without a finding."""
    monkeypatch.setattr(dispatch, "device_backend", lambda: "metal")
    # The test is the check.
    monkeypatch.setattr(choice, "_is_right", lambda *_: True)
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    choice.forget()
    dispatch.backend_of.cache_clear()
    with Host(builder).running() as host:
        yield host
    choice.forget()
    dispatch.backend_of.cache_clear()
    assert host.findings == {}
    assert host.outcomes, "no kernel ran"


def kernel_of(record: str) -> str:
    """Return the kernel with the longest name that is a prefix of a record's name."""
    fits = [k for k in dispatch.KERNELS if f"{record}_".startswith(PREFIX + k + "_")]
    return max(fits, key=len)


def names(host: Host) -> set[str]:
    return {kernel_of(record.name) for record, _ in host.outcomes}


def flat(tree: Any) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], tree_flatten(tree, destination={}))


def normal(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    values = np.random.default_rng(seed).standard_normal(shape)
    return mx.array(values.astype(np.float32)).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "has_bias"),
    [(mx.float32, False), (mx.float16, True), (mx.bfloat16, True)],
)
def test_dora_scale_and_its_gradients(
    device: Host, dtype: mx.Dtype, has_bias: bool
) -> None:
    out, r, s = 133, 5, 0.7
    y, h = normal(2, 35, out, dtype=dtype), normal(2, 35, r, seed=1, dtype=dtype)
    y = y.swapaxes(0, 1)  # not contiguous
    h = h.swapaxes(0, 1)
    b, m = normal(r, out, seed=2), normal(out, seed=3)
    n = mx.abs(normal(out, seed=4)) + 0.5
    bias = 0.1 * normal(out, seed=5)  # o - b loses digits where b outweighs g∘u
    dy = normal(35, 2, out, seed=6, dtype=dtype)
    m[7] = 0.0  # stays 0

    def run(
        y: mx.array, h: mx.array, b: mx.array, m: mx.array, bias: mx.array
    ) -> mx.array:
        return kernels.dora_scale(y, h, b, s, m, n, bias if has_bias else None)

    (out_,), gradients = mx.vjp(run, [y, h, b, m, bias], [dy])
    y64, h64, b64, m64, n64, dy64 = map(to_numpy, (y, h, b, m, n, dy))
    u, g = y64 + s * h64 @ b64, m64 / n64
    scaled = g * dy64
    dm = (dy64 * u / n64).sum((0, 1))
    dm[7] = 0
    expected = [
        scaled,
        s * scaled @ b64.T,
        s * h64.reshape(-1, r).T @ scaled.reshape(-1, out),
        dm,
        dy64.sum((0, 1)) if has_bias else np.zeros(out),
    ]
    assert out_.dtype == dtype
    assert_close(out_, g * u + (to_numpy(bias) if has_bias else 0), dtype)
    for gradient, truth in zip(gradients, expected, strict=True):
        assert_close(gradient, truth, dtype)
    assert names(device) == {"dora_scale", "dora_scale_backward", "dora_scale_columns"}


def test_the_eval_mode_of_a_layer_takes_the_kernel(
    device: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = DoRALinear.from_base(nn.Linear(40, 30), r=4)
    layer.lora_b = 0.1 * normal(4, 30)
    layer.m = layer.m * 1.5
    layer.eval()
    x = normal(3, 5, 40, seed=1)
    monkeypatch.setenv("MLX_DORA_KERNELS", "reference")
    expected = to_numpy(layer(x))
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    assert_close(layer(x), expected)
    assert names(device) == {"dora_scale"}


def test_normalize_rows_and_its_gradient(device: Host) -> None:
    weight, magnitude = normal(5, 70), normal(5, seed=1)
    pull = normal(5, 70, seed=2)

    def loss(op: Callable[..., Any]) -> Callable[..., mx.array]:
        def run(w: mx.array, m: mx.array) -> mx.array:
            rescaled, norm = op(w, m)
            return (rescaled * pull).sum() + norm.sum()

        return run

    got = mx.value_and_grad(loss(kernels.normalize_rows), argnums=(0, 1))(
        weight, magnitude
    )
    want = mx.value_and_grad(loss(plain.normalize_rows), argnums=(0, 1))(
        weight, magnitude
    )
    for name, value in flat(got).items():
        assert_close(value, to_numpy(flat(want)[name]))


def test_adapted_norm_is_a_constant_of_the_backward_pass(device: Host) -> None:
    weight, a, b = normal(6, 50), normal(50, 2, seed=1), normal(2, 6, seed=2)

    def loss(w: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return kernels.adapted_norm(w, a, b, 1.0).sum()

    gradients = mx.grad(loss, argnums=(0, 1, 2))(weight, a, b)
    assert all((g == 0).all() for g in gradients)


def test_a_packed_weight_is_fused_block_by_block(
    device: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("mlx_dora.kernels.fused_weight")
    monkeypatch.setattr(module, "row_blocks", partial(row_blocks, elements=64 * 4))
    values, scales, biases = mx.quantize(normal(10, 64), 32, 4)
    weight = kernels.QuantizedWeight(
        weight=values, scales=scales, biases=biases, group_size=32, bits=4
    )
    a, b, m = normal(64, 3, seed=1), normal(3, 10, seed=2), normal(10, seed=3)
    fused = kernels.fused_weight(weight, a, b, 0.5, m)
    assert len(device.outcomes) == 3
    full = to_numpy(weight.dequantize()) + 0.5 * (to_numpy(a) @ to_numpy(b)).T
    norm = np.linalg.norm(full, axis=1, keepdims=True)
    assert_close(fused, to_numpy(m)[:, None] * full / norm)


@pytest.mark.parametrize(
    "case",
    [
        Case("normalize_rows", mx.float32, 5, 70),
        Case("adapted_norm", mx.bfloat16, 9, 50, 3),
        Case("adapted_norm", mx.float16, 6, 128, 3, 4, 64),
        Case("fused_weight", mx.float32, 7, 50, 3),
        Case("dora_scale", mx.bfloat16, 20, 133, 5, has_offset=True),
        Case("dora_scale", mx.float16, 20, 133, 5, has_gradients=True),
    ],
    ids=lambda case: case.text,
)
def test_a_case_to_be_measured_is_found_right(device: Host, case: Case) -> None:
    """The inputs, the launch and the comparison of a measurement, on real kernels."""
    found = check(case, job_of(case))
    assert found.problem is None
    assert found.takes_kernel
    assert found.error is not None
    assert found.error <= {2: 5e-3, 4: 1e-6}[case.dtype.size]


def losses(
    make_model: Callable[..., nn.Module], bits: int | None, with_checkpoint: bool
) -> tuple[list[float], nn.Module]:
    """Three steps of training a DoRA adapter on a two-layer Llama."""
    model = make_model(bits=bits)
    apply_dora(model, CONFIG)
    mx.random.seed(1)
    start = {
        name: 0.1 * mx.random.normal(value.shape)
        for name, value in trainable_tensors(model).items()
        if name.endswith("lora_b")
    }
    model.load_weights(list(start.items()), strict=False)
    model.train()

    def loss() -> mx.array:
        logits = model(TOKENS[:, :-1])
        return nn.losses.cross_entropy(logits, TOKENS[:, 1:], reduction="mean")

    run = nn.value_and_grad(model, checkpoint(model, loss) if with_checkpoint else loss)
    values = []
    for _ in range(3):
        value, gradients = run()
        now = trainable_tensors(model)
        moved = tree_map(lambda new, step: new - 0.5 * step, now, flat(gradients))
        model.load_weights(list(moved.items()), strict=False)
        values.append(value.item())
    return values, model


@pytest.mark.parametrize(("bits", "with_checkpoint"), [(None, False), (4, True)])
def test_a_model_trains_to_the_losses_of_the_reference(
    make_tiny_model: Callable[..., nn.Module],
    device: Host,
    monkeypatch: pytest.MonkeyPatch,
    bits: int | None,
    with_checkpoint: bool,
) -> None:
    by_kernels, model = losses(make_tiny_model, bits, with_checkpoint)
    norm = "adapted_norm" if bits is None else "adapted_norm_packed"
    scale = {"dora_scale", "dora_scale_backward", "dora_scale_columns"}
    assert names(device) == {norm, "adapted_norm_total", *scale}
    monkeypatch.setenv("MLX_DORA_KERNELS", "reference")
    by_reference, twin = losses(make_tiny_model, bits, False)
    assert by_kernels == pytest.approx(by_reference, rel=1e-5)
    assert by_kernels[-1] < by_kernels[0]
    theirs = trainable_tensors(twin)
    for name, value in trainable_tensors(model).items():
        assert_close(value, to_numpy(theirs[name]), bound=1e-4)
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    fuse_dora(model)
    assert "fused_weight" in names(device)


def test_kernels_are_launched_while_mlx_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "device_backend", lambda: "metal")
    monkeypatch.setattr(choice, "_is_right", lambda *_: True)
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    choice.forget()
    dispatch.backend_of.cache_clear()
    weight, a, b = normal(40, 50), normal(50, 2, seed=1), normal(2, 40, seed=2)
    m, x = normal(40, seed=3), normal(7, 50, seed=4)

    def loss(a: mx.array, b: mx.array, m: mx.array, x: mx.array) -> mx.array:
        norm = kernels.adapted_norm(weight, a, b, 0.5)
        return kernels.dora_scale(x @ weight.T, x @ a, b, 0.5, m, norm).sum()

    step = mx.compile(mx.grad(mx.checkpoint(loss), argnums=(0, 1, 2)))
    records = launched([lambda: mx.eval(step(a, b, m, x))])
    choice.forget()
    dispatch.backend_of.cache_clear()
    scale = {"dora_scale", "dora_scale_backward", "dora_scale_columns"}
    norm_stages = {"adapted_norm", "adapted_norm_total"}
    assert {kernel_of(record.name) for record in records} == {*norm_stages, *scale}


def test_no_kernel_reads_a_scalar() -> None:
    """MLX's CUDA build keeps arrays of up to 8 bytes in memory of the host."""
    norm = import_module("mlx_dora.kernels.adapted_norm")
    fused = import_module("mlx_dora.kernels.fused_weight")
    scale = import_module("mlx_dora.kernels.rescale")
    weight, a, b = normal(40, 64), normal(64, 2, seed=1), normal(2, 40, seed=2)
    packed = kernels.QuantizedWeight(
        **dict(zip(("weight", "scales", "biases"), mx.quantize(weight), strict=True)),
        group_size=64,
        bits=4,
    )
    records = launched(
        [
            partial(norm.launched, weight, a, b, 0.5),
            partial(norm.launched, packed, a, b, 0.5),
            partial(fused.launched, weight, a, b, 0.5, normal(40)),
            partial(scale.launched, weight @ weight.T, weight @ a, b, normal(40)),
        ]
    )
    given = [(r.name, s, d.size) for r in records for s, d in r.inputs]
    assert len(given) > 15
    assert [each for each in given if math.prod(each[1]) * each[2] <= 8] == []
