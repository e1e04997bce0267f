"""The specification of every op: its formula, in float32, on dense weights.

These functions are not optimized and do not check arguments. `plain` has the same ops
in tuned MLX, and ``metal/`` as kernels; tests compare all three. Shapes follow MLX:
weight ``(out, in)``, lora_a ``(in, r)``, lora_b ``(r, out)``. The paper's column norm
is the norm of each output row here.
"""

import mlx.core as mx


def normalize_rows(
    weight: mx.array, magnitude: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Return m·W/‖W‖ and ‖W‖ of each row; a zero row stays zero."""
    norm = mx.linalg.norm(weight.astype(mx.float32), axis=1)
    gain = mx.where(norm > 0, (1.0 if magnitude is None else magnitude) / norm, 0.0)
    return (gain[:, None] * weight).astype(weight.dtype), norm


def adapted_norm(
    weight: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float
) -> mx.array:
    """Return ‖W + s·BA‖ of each row, a constant in the backward pass."""
    adapted = weight.astype(mx.float32) + scale * (lora_a @ lora_b).T
    return mx.stop_gradient(mx.linalg.norm(adapted, axis=1))


def fused_weight(
    weight: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float, m: mx.array
) -> mx.array:
    """Return m·(W + s·BA)/‖W + s·BA‖, rounded once to the dtype of W."""
    adapted = weight.astype(mx.float32) + scale * (lora_a @ lora_b).T
    return normalize_rows(adapted, m)[0].astype(weight.dtype)


def rescale(
    y: mx.array,
    h: mx.array,
    up: mx.array,
    gain: mx.array,
    offset: mx.array | None = None,
) -> mx.array:
    """Return g∘(y + h·up) + offset, rounded once to the dtype of y."""
    out = gain * (y.astype(mx.float32) + h.astype(mx.float32) @ up)
    return (out if offset is None else out + offset).astype(y.dtype)


def dora_scale(
    y: mx.array,
    h: mx.array,
    lora_b: mx.array,
    scale: float,
    m: mx.array,
    norm: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    """Return m/n∘(y + s·h·B) + b: Eq. 5 of DoRA (arXiv:2402.09353) on activations."""
    return rescale(y, h, scale * lora_b, mx.where(norm > 0, m / norm, 0.0), bias)
