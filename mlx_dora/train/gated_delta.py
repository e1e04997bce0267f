r"""Trains gated delta nets through MLX's own operation where it has a gradient.

For each token, with decay g and rate β:

.. math:: S \leftarrow g S; \quad
    S \leftarrow S + \beta (v - S k) k^\top; \quad y = S q

In training mlx-lm computes this with some operations per token. MLX 0.32.4 has kernels
for the whole sequence and its gradient, `mx.fast.gated_delta_update`, for some shapes.
"""

import logging
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_dora.train.metal import kernel_names, trains_on_metal

logger = logging.getLogger(__name__)

_KERNEL = r"seq_gated_delta_vjp_[a-z0-9]+(?:_t)?_\d+_\d+_\d+_\d+_\d+"
_CHECKED_TOKENS = 33  # two chunks of 16, and one more
# Relative to the largest value; float32 sums of other orders, and rounded outputs.
_BOUNDS = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}

Step = Callable[..., tuple[mx.array, mx.array]]


@dataclass(frozen=True, kw_only=True)
class DeltaShape:
    """Numbers and widths of the heads of keys and values."""

    key_heads: int
    key_width: int
    value_heads: int
    value_width: int


def differentiable_shapes() -> frozenset[DeltaShape]:
    """Shapes for which the installed MLX has a kernel of the gradient here.

    Read from the names of its kernels; none on another device than an Apple GPU.
    """
    if not trains_on_metal():
        return frozenset()
    return shapes_in(kernel_names(_KERNEL))


def shapes_in(names: frozenset[str]) -> frozenset[DeltaShape]:
    """Shapes in names such as ``seq_gated_delta_vjp_float_128_128_16_32_1``."""
    sizes = (re.findall(r"_(\d+)", name)[-5:-1] for name in names)
    return frozenset(
        DeltaShape(key_width=dk, value_width=dv, key_heads=hk, value_heads=hv)
        for dk, dv, hk, hv in (map(int, numbers) for numbers in sizes)
    )


@contextmanager
def fused_delta(shapes: frozenset[DeltaShape] | None = None) -> Iterator[None]:
    """Let mlx-lm's gated delta nets train through `mx.fast.gated_delta_update`.

    A call goes there if its decay is one number per head, it has no mask, and its shape
    is one of `shapes`. At the first call of each shape and dtype, values and gradients
    are compared with mlx-lm's operations on random numbers; if they differ, a warning
    is logged and mlx-lm's operations are used. Inference is unchanged.

    Args:
        shapes: Shapes with a gradient; default: `differentiable_shapes`.
    """
    gated_delta: Any = sys.modules.get("mlx_lm.models.gated_delta")
    if gated_delta is None:  # no model that uses it was loaded
        yield
        return
    shapes = differentiable_shapes() if shapes is None else shapes
    if not shapes:
        yield
        return
    plain: Step = gated_delta.gated_delta_ops
    agreed: dict[tuple[DeltaShape, mx.Dtype], bool] = {}

    def update(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        g: mx.array,
        beta: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
    ) -> Any:
        shape = DeltaShape(
            key_heads=k.shape[2],
            key_width=k.shape[3],
            value_heads=v.shape[2],
            value_width=v.shape[3],
        )
        if mask is not None or g.ndim != 3 or shape not in shapes:
            return plain(q, k, v, g, beta, state, mask)
        case = shape, q.dtype
        if case not in agreed:
            agreed[case] = _agrees(shape, q.dtype, plain)
        if not agreed[case]:
            return plain(q, k, v, g, beta, state)
        return _fused(q, k, v, g, beta, state)

    gated_delta.gated_delta_ops = update
    try:
        yield
    finally:
        gated_delta.gated_delta_ops = plain


def _fused(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None,
) -> Any:
    return mx.fast.gated_delta_update(q, k, v, g, beta, initial_state=state)


def _agrees(shape: DeltaShape, dtype: mx.Dtype, plain: Step) -> bool:
    """Compare values and gradients with mlx-lm's operations; log the result."""
    inputs = _random_inputs(shape, dtype)
    worst = 0.0
    for one, other in zip(
        _with_gradients(_fused, inputs), _with_gradients(plain, inputs), strict=True
    ):
        one, other = one.astype(mx.float32), other.astype(mx.float32)
        largest = mx.maximum(mx.abs(other).max(), 1e-30)
        error = float(mx.abs(one - other).max() / largest)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    bound = _BOUNDS.get(dtype, 0.0)
    if worst <= bound:
        logger.info("gated delta nets train through MLX's kernel: %s", shape)
        return True
    logger.warning(
        "mx.fast.gated_delta_update differs from mlx-lm's operations by %.2g for %s in "
        "%s (at most %g expected): training with mlx-lm's operations, which are slower",
        worst,
        shape,
        dtype,
        bound,
    )
    return False


def _random_inputs(shape: DeltaShape, dtype: mx.Dtype) -> list[mx.array]:
    keys = [mx.random.key(number) for number in range(6)]
    queried = (1, _CHECKED_TOKENS, shape.key_heads, shape.key_width)
    valued = (1, _CHECKED_TOKENS, shape.value_heads, shape.value_width)
    q, k = (mx.random.normal(queried, key=key) for key in keys[:2])
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g = mx.random.uniform(0.8, 1.0, valued[:3], key=keys[3])
    beta = mx.random.uniform(0.0, 1.0, valued[:3], key=keys[4])
    state = (1, shape.value_heads, shape.value_width, shape.key_width)
    return [
        q.astype(dtype),
        k.astype(dtype),
        mx.random.normal(valued, key=keys[2]).astype(dtype),
        g,
        beta.astype(dtype),
        0.1 * mx.random.normal(state, key=keys[5]),
    ]


def _with_gradients(step: Step, inputs: list[mx.array]) -> list[mx.array]:
    """Outputs of a step, and gradients of a sum that weighs them unevenly."""

    def total(*inputs: mx.array) -> mx.array:
        y, state = step(*inputs)
        weights = mx.cos(mx.arange(y.size).reshape(y.shape))
        whole = (weights * y.astype(mx.float32)).sum()
        return whole + mx.sin(state.astype(mx.float32)).sum()

    gradients = mx.grad(total, argnums=tuple(range(len(inputs))))(*inputs)
    results = [*step(*inputs), *gradients]
    mx.eval(results)
    return results
