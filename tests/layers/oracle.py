"""DoRA in float64 NumPy, forward and backward, written from the paper's equations."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tests.checks import to_numpy

QUANTIZED_MODES = [
    ("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)
] + [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def quantized(linear: nn.Linear, group: int, bits: int, mode: str = "affine") -> Any:
    """Return the packed layer, with a narrower type than MLX declares."""
    return linear.to_quantized(group, bits, mode)


@dataclass
class Truth:
    """Expected output and gradients of a layer for an input and a cotangent."""

    out: np.ndarray
    lora_a: np.ndarray
    lora_b: np.ndarray
    m: np.ndarray
    x: np.ndarray


def dora_truth(
    x, weight, lora_a, lora_b, scale, m, cotangent, bias=None, dropped=None
) -> Truth:
    """Eq. 5 with the norm a constant (section 4.3); `dropped` replaces x in A's branch.

    All arguments are float64 arrays; weight (out, in), lora_a (in, r), lora_b (r, out).
    """
    low = x if dropped is None else dropped
    flat = low.reshape(-1, low.shape[-1])
    norm = np.linalg.norm(weight + scale * (lora_a @ lora_b).T, axis=1)
    gain = np.divide(m, norm, out=np.zeros_like(m), where=norm > 0)
    u = x @ weight.T + scale * (low @ lora_a) @ lora_b
    out = gain * u + (0 if bias is None else bias)
    dy = (gain * cotangent).reshape(-1, gain.size)
    unit = np.divide(u, norm, out=np.zeros_like(u), where=norm > 0)
    with_low = scale * (dy @ lora_b.T) @ lora_a.T
    keep = 1.0
    if dropped is not None:
        keep = np.divide(dropped, x, out=np.zeros_like(x), where=x != 0)
    return Truth(
        out=out,
        lora_a=scale * flat.T @ (dy @ lora_b.T),
        lora_b=scale * (flat @ lora_a).T @ dy,
        m=(cotangent * unit).reshape(-1, gain.size).sum(0),
        x=(dy @ weight).reshape(x.shape) + keep * with_low.reshape(x.shape),
    )


def dense_weight(base: Any) -> np.ndarray:
    """Return the weight of a base module in float64, unpacked by MLX if packed."""
    weight = base.weight
    if hasattr(base, "scales"):
        weight = mx.dequantize(
            base.weight,
            base.scales,
            base.biases,
            group_size=base.group_size,
            bits=base.bits,
            mode=base.mode,
        )
    return to_numpy(weight)


def trained(layer: Any, seed: int = 0, size: float = 0.3) -> Any:
    """Give a new layer a B and magnitudes like those after training."""
    rng = np.random.default_rng(seed)
    b = rng.standard_normal(layer.lora_b.shape) * size / layer.scale
    layer.lora_b = mx.array(b.astype(np.float32))
    moved = 1 + 0.1 * rng.standard_normal(layer.m.shape)
    layer.m = layer.m * mx.array(moved.astype(np.float32))
    return layer


def value_and_gradients(
    layer: Any, x: mx.array, cotangent: np.ndarray, call: Any = None
) -> tuple[mx.array, dict[str, mx.array], Any]:
    """Return output and gradients of lora_a, lora_b, m and x for a cotangent."""
    call = call or layer
    weights = mx.array(cotangent.astype(np.float32))

    def loss(params, x):
        layer.update(params)
        return (call(x).astype(mx.float32) * weights).sum()

    out = call(x)
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
    params = layer.trainable_parameters()
    if mx.issubdtype(x.dtype, mx.floating):
        gradients, dx = mx.grad(loss, argnums=(0, 1))(params, x)
    else:
        gradients, dx = mx.grad(loss)(params, x), None
    layer.update(params)
    return out, gradients, dx
