"""Measures matrix-product speed, and checks our layers against NumPy in float64."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.kernels.dispatch import device_backend, multiplies_in_tf32
from mlx_dora.layers import DoRALinear

# Floating-point operations of the timed product, (512, 2048) by (2048, 2048).
_PRODUCT_FLOP = 2 * 512 * 2048 * 2048
# MLX's reference BLAS reaches 2, and OpenBLAS on two cores 195.
SLOW_GFLOPS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCheck:
    """A layer's error on one kind of base, and its time for one token."""

    name: str
    error: float
    bound: float
    base_us: float
    dora_us: float

    @property
    def is_right(self) -> bool:
        """Whether the error is within the bound; false for NaN."""
        return self.error <= self.bound


def _seconds(run: Callable[[], mx.array], repeats: int) -> float:
    mx.eval(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_gflops(dtype: mx.Dtype = mx.float32) -> float:
    """Return the GFLOP/s of a (512, 2048) by (2048, 2048) product on this device."""
    a = mx.random.normal((512, 2048), key=mx.random.key(0)).astype(dtype)
    b = mx.random.normal((2048, 2048), key=mx.random.key(1)).astype(dtype)
    mx.eval(a, b)
    first = _seconds(lambda: a @ b, 1)
    # The reference BLAS needs seconds per product, so a slow one is not repeated.
    return (
        _PRODUCT_FLOP
        / min(first, _seconds(lambda: a @ b, 5 if first < 0.5 else 1))
        / 1e9
    )


def _true_output(layer: DoRALinear, base: mx.array, x: mx.array) -> np.ndarray:
    def double(array: mx.array) -> np.ndarray:
        return np.array(array.astype(mx.float32)).astype(np.float64)

    update = (double(layer.lora_a) @ double(layer.lora_b)).T  # (out, in)
    adapted = double(base) + layer.scale * update
    norm = np.linalg.norm(adapted, axis=1)  # per output row
    return double(x) @ (double(layer.m) / norm * adapted.T)


def _check(name: str, dtype: mx.Dtype, bits: int | None, bound: float) -> LayerCheck:
    mx.random.seed(0)
    linear: nn.Linear | nn.QuantizedLinear = nn.Linear(1024, 1024, bias=False)
    linear.set_dtype(dtype)
    base = linear.weight
    if bits is not None:
        linear = nn.QuantizedLinear.from_linear(linear, group_size=64, bits=bits)
        base = mx.dequantize(
            linear.weight, linear.scales, linear.biases, group_size=64, bits=bits
        )
    layer = DoRALinear.from_base(linear, r=8)
    layer.lora_b = 0.01 * mx.random.normal(layer.lora_b.shape)
    layer.m = layer.m * mx.random.uniform(0.9, 1.1, layer.m.shape)
    layer.eval()
    x = mx.random.normal((4, 1024)).astype(dtype)
    truth = _true_output(layer, base, x)
    got = np.array(layer(x).astype(mx.float32)).astype(np.float64)
    error = np.sqrt(np.mean((got - truth) ** 2) / np.mean(truth**2))
    token = x[:1]
    return LayerCheck(
        name=name,
        error=float(error),
        bound=bound,
        base_us=_seconds(lambda: linear(token), 30) * 1e6,
        dora_us=_seconds(lambda: layer(token), 30) * 1e6,
    )


def check_layers() -> list[LayerCheck]:
    """Compare a DoRA layer on this device with float64 NumPy, per kind of base."""
    single = 1e-3 if multiplies_in_tf32(device_backend()) else 1e-5
    return [
        _check("float32", mx.float32, None, single),
        _check("float16", mx.float16, None, 1e-3),
        _check("bfloat16", mx.bfloat16, None, 8e-3),
        # Not in half precision, in which MLX's quantized product on the CPU would sum.
        _check("4-bit, float32", mx.float32, 4, single),
    ]
